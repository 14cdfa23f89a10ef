"""The messages of a conversation as a chat template takes them: each key is honoured or refused.

In: messages as people write them (OpenAI's form, transformers', ShareGPT's turns). Out: the same
with content as text, arguments of tool calls as objects, and without keys that hold nothing. What
a template reads is told by `words`, the names and texts in it (`chat_template.words_of`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.characters import check_characters
from gptjax.core.foreign_keys import KeyTable, Refusal

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | ..., "content": text}

# roles of ShareGPT's {"from": ..., "value": ...}
SHARE_GPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of what a model thought
_WEIGHT = 'to keep a message from being learned, give it "weight": 0'
_REASONING = (
    "the chat template does not read it, so it would be lost: write it in the content, as the "
    "model writes it, or drop the key"
)

MESSAGE_KEYS = KeyTable(
    "A message of a conversation",
    used=frozenset({"role", "content", "weight"}),
    no_effect={
        "tool_call_id": "where the template does not read it, results follow calls in their order",
        "id": "a name of the message",
        "message_id": "a name of the message",
        "parent_id": "a name of another message",
        "tree_id": "a name of the conversation",
        "timestamp": "when it was written",
        "created_at": "when it was written",
        "language": "a label of the text",
        "lang": "a label of the text",
        "model": "what wrote it",
        "source": "where it comes from",
        "turn_identifier": "a name of the message",
        "finish_reason": "how the answer ended",
        "annotations": "links that a service adds to an answer",
        **dict.fromkeys(("country", "state", "header", "hashed_ip"), "who wrote it"),
        **dict.fromkeys(("toxic", "redacted", "markdown"), "a label of the text"),
    },
    refused={
        "tool_calls": Refusal(
            "the chat template does not read tool calls, so they would be lost: take a checkpoint "
            "whose template does, or write them in the content",
            unless=(False, []),
        ),
        "function_call": Refusal('this older form is now "tool_calls": a list of calls'),
        **dict.fromkeys(REASONING, Refusal(_REASONING, unless=(False, ""))),
        "name": Refusal(
            "the chat template does not read names, so it would be lost: write it in the content, "
            "or drop the key",
            unless=("",),
        ),
        "train": Refusal(_WEIGHT, unless=(True,)),
        "training": Refusal(_WEIGHT, unless=(True,)),
        "trainable": Refusal(_WEIGHT, unless=(True,)),
        "learn": Refusal(_WEIGHT, unless=(True,)),
        "loss": Refusal(_WEIGHT, unless=(True, 1, 1.0)),
        "mask": Refusal(_WEIGHT),
        "masked": Refusal(_WEIGHT),
        "from": Refusal('write "role" and "content", or ShareGPT\'s "from" and "value" alone'),
        "value": Refusal('write "role" and "content", or ShareGPT\'s "from" and "value" alone'),
        "text": Refusal('the text of a message is its "content"', unless=("",)),
        "images": Refusal("models here read text alone", unless=(False, [])),
        "audio": Refusal("models here read text alone", unless=(False, [])),
        "refusal": Refusal("what the assistant says is its content", unless=("",)),
    },
)


@dataclasses.dataclass(frozen=True)
class Words:
    """What a chat template reads: its variables, and all names and texts in it.

    reads_all: whether it writes a message as a whole, with every key.
    """

    variables: frozenset[str]
    names: frozenset[str]
    reads_all: bool = False


def read_messages(messages: Sequence[Any], words: Words) -> list[dict[str, Any]]:
    """The messages as the template takes them. Raises UserError, which names the message."""
    table = MESSAGE_KEYS
    if words.reads_all:
        table = dataclasses.replace(table, used=table.used | set(_keys_of(messages)))
    table = dataclasses.replace(table, used=table.used | words.names)
    return [
        _read_message(message, f"message {i}", table, words) for i, message in enumerate(messages)
    ]


def _keys_of(messages: Sequence[Any]) -> Iterator[str]:
    for message in messages:
        if isinstance(message, Mapping):
            yield from message


def _read_message(message: Any, where: str, table: KeyTable, words: Words) -> dict[str, Any]:
    message = from_share_gpt(message, where)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        text = dict(message) if isinstance(message, Mapping) else message
        raise UserError(
            f"{where} is {str(text)[:80]!r}: each message is {{'role': ..., 'content': ...}}"
        )
    values = {k: v for k, v in message.items() if v is not None or k == "content"}
    checked = dict(values)
    if values["role"] == "tool":
        checked.pop("name", None)  # a result belongs to its call
    table.check(checked, where)
    if values.get("weight", 1) not in (0, 1):
        raise UserError(f"{where} has the weight {values['weight']!r}: 1 = learned, 0 = not")
    if "content" in values:
        values["content"] = _content(values, where, words)
    elif not values.get("tool_calls"):
        raise UserError(f"{where} has no content: each message is {{'role': ..., 'content': ...}}")
    if calls := values.get("tool_calls"):
        values["tool_calls"] = _tool_calls(calls, where)
    if values["role"] == "developer" and "developer" not in words.names:
        values["role"] = "system"  # its newer name, which this template does not know
    for text in texts_in(values):
        check_characters(text, where)
    return values


def from_share_gpt(message: Any, where: str) -> Any:
    """ShareGPT's {"from": "human", "value": text} as {"role": "user", "content": text}; what has
    another form as it is. Raises UserError for an unknown role.
    """
    if (
        not isinstance(message, Mapping)
        or "role" in message
        or not {"from", "value"} <= set(message)
    ):
        return message
    role = SHARE_GPT_ROLES.get(str(message["from"]))
    if role is None:
        raise UserError(
            f"{where} is from {message['from']!r}: there are {', '.join(SHARE_GPT_ROLES)}"
        )
    others = {k: v for k, v in message.items() if k not in ("from", "value")}
    return {"role": role, "content": message["value"], **others}


def _content(values: Message, where: str, words: Words) -> Any:
    """A text, or the parts of one where the template reads parts; None with tool calls."""
    content = values["content"]
    if content is None:
        if values.get("tool_calls"):
            return None
        raise UserError(f"{where} of the {values['role']} has the content null and calls no tool")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: its content is a {type(content).__name__} instead of a text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise UserError(f"{where} has a part of type {kind!r}: models here read text alone")
        texts.append(text)
    reads_parts = {"type", "text"} <= words.names
    return content if reads_parts else "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects: templates write the JSON. Raises UserError."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where}: its tool_calls are no list of calls")
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: a tool call is {str(dict(call))[:60]}: "
                'each is {"type": "function", "function": {"name": ..., "arguments": ...}}'
            )
        changed = dict(function)
        if isinstance(changed.get("arguments"), str):
            try:
                changed["arguments"] = json.loads(changed["arguments"] or "{}")
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: the arguments of {changed['name']} are no JSON: {error}"
                ) from None
        read.append({**call, "function": changed} if "function" in call else changed)
    return read


def read_tools(tools: Any) -> list[Any]:
    """A row's tools: a list of JSON schemas, or the JSON of one. Raises UserError."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"tools are no JSON: {error}") from None
    if not isinstance(tools, list):
        raise UserError(f"tools are a {type(tools).__name__} instead of a list of schemas")
    return [
        json.loads(tool) if isinstance(tool, str) and tool.startswith("{") else tool
        for tool in tools
    ]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested mappings and lists, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *texts_in(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
