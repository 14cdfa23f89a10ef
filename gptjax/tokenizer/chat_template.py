"""Conversations through the checkpoint's own chat template, run in a sandbox.

In: messages. Out: token ids. A template may write control tokens, and people may not: where a
message spells the name of one, a guard character inside the name keeps it text.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer.base import Tokenizer

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | ..., "content": text}

SECONDS = 5  # a template that runs longer is hostile or broken


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of the filled template, as transformers' `apply_chat_template` gives it.

    variables: `bos_token`, `tools`, ... Raises UserError where the template fails, refuses the
    conversation or runs for longer than SECONDS.
    """
    values = {
        "tools": None,
        "documents": None,
        **variables,
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with _time_limit():
            return _compile(template).render(**values)
    except UserError:
        raise
    except Exception as error:  # a template can raise nearly anything
        raise UserError(
            "the checkpoint's chat template does not run: "
            f"{type(error).__name__}: {str(error)[:150]}"
        ) from None


@functools.lru_cache(8)
def _compile(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; its body is written as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def format_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = format_now
    return environment.from_string(template)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Ends the block with a UserError after `SECONDS`; in the main thread, where Python can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise UserError(f"the checkpoint's chat template ran for {SECONDS} s and was stopped")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plain_template(tokenizer: Tokenizer) -> str:
    """A template for a checkpoint that was never tuned for dialogue.

    Each message is a line `User:` or `Assistant:`, its text, and the end token, which no message
    can write. Raises UserError where the vocabulary has no name for that token.
    """
    names = {i: name for name, i in tokenizer.control.items()}
    if not names.keys() >= {tokenizer.eos_ids[0], *tokenizer.bos_ids}:
        raise UserError(
            "the vocabulary has no name for its first or end token, so no chat template can write "
            "it: take a checkpoint with a template"
        )
    bos = "".join(names[i] for i in tokenizer.bos_ids)
    eos = names[tokenizer.eos_ids[0]]
    message = "{{ message.role | capitalize }}:\n{{ message.content or '' }}" + eos
    messages = "{% for message in messages %}" + message + "{% endfor %}"
    return bos + messages + "{% if add_generation_prompt %}Assistant:\n{% endif %}"


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's answer.

    Raises UserError for a model without a template or a malformed message.
    """
    values, guard = _prepare(tokenizer, messages, variables)
    return tokenizer.encode_template(_render(tokenizer, values, add_generation_prompt), guard)


def split_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """Ids of a conversation in spans, each with whether the assistant is to learn it.

    It learns what it writes after the prompt for its answer, with the end token that closes it.
    The spans are found by filling the template turn by turn, never by searching its text. Raises
    UserError where the template does not allow that, or an answer is empty.
    """
    values, guard = _prepare(tokenizer, messages, {})
    prepared = values["messages"]
    spans: list[tuple[list[int], bool]] = []
    done, done_ids = "", list[int]()  # the conversation through the last answer
    for i, message in enumerate(prepared):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, {**values, "messages": prepared[:i]}, True)
        after = _render(tokenizer, {**values, "messages": prepared[: i + 1]}, False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                "the chat template rewrites earlier turns, so what the assistant said cannot be "
                "told from the rest: simplify the template"
            )
        before_ids = tokenizer.encode_template(before, guard)
        after_ids = tokenizer.encode_template(after, guard)
        answer = _ids_after(before_ids, after_ids)
        if not answer:
            answer = tokenizer.encode_template(after[len(before) :], guard)
        end = _end_of_answer(tokenizer, answer, i)
        question = _ids_after(done_ids, before_ids)
        if not question:
            question = tokenizer.encode_template(before[len(done) :], guard)
        spans += [(question, False), (answer[:end], True), (answer[end:], False)]
        done, done_ids = after, after_ids
    return [(ids, learned) for ids, learned in spans if ids]


def _ids_after(beginning: list[int], ids: list[int]) -> list[int]:
    """The ids after those of the beginning; nothing where a token spans the border."""
    return ids[len(beginning) :] if ids[: len(beginning)] == beginning else []


def _end_of_answer(tokenizer: Tokenizer, answer: list[int], number: int) -> int:
    """How many ids the assistant is to learn: through the first end token. Raises UserError."""
    ends = [k for k, token in enumerate(answer) if token in tokenizer.eos_ids]
    if not ends:
        raise UserError(
            "the chat template closes no answer with an end token, so a model could not learn to "
            "stop: use a template that does"
        )
    if not tokenizer.decode_bytes(answer[: ends[0]]).strip():
        raise UserError(
            f"message {number} of the assistant is empty: there is nothing to learn from"
        )
    return ends[0] + 1


def _prepare(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """(values of the template's variables, guard that keeps names of control tokens text)."""
    if not tokenizer.template_for(variables.get("tools")):
        if tokenizer.templates:
            raise UserError(
                f"the checkpoint's chat templates are named {', '.join(tokenizer.templates)}, and "
                "none is named 'default': rename the one that is meant in tokenizer_config.json"
            )
        raise UserError(
            "this checkpoint has no chat template, so it is no chat model: use --prompt, or a "
            "checkpoint tuned for dialogue"
        )
    for i, message in enumerate(messages):
        if not _is_message(message):
            raise UserError(
                f"message {i} is {str(message)[:80]!r}: "
                "each message is {'role': ..., 'content': ...}"
            )
    names = [name for name in tokenizer.control if name]
    values: dict[str, Any] = {"messages": list(messages), **variables}
    texts = list(_texts(values))
    guard = ""
    if any(_contains_any(text, names) for text in texts):
        guard = _free_character(texts)
        values = _guarded(values, names, guard)
    return {**tokenizer.special, **values}, guard


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or "role" not in message:
        return False
    return isinstance(message.get("content", ""), str | list | None)


def _contains_any(text: str, names: Sequence[str]) -> bool:
    return any(name in text for name in names)


def _free_character(texts: Sequence[str]) -> str:
    """A character that occurs in none of the texts. Raises UserError where there is none."""
    for code in range(0xFDD0, 0xFDF0):  # Unicode's noncharacters: no text needs them
        if not any(chr(code) in text for text in texts):
            return chr(code)
    raise UserError(
        "the conversation holds names of control tokens and all 32 of Unicode's noncharacters "
        "from U+FDD0: take one of them out"
    )


def _render(tokenizer: Tokenizer, values: Mapping[str, Any], add_generation_prompt: bool) -> str:
    variables = {name: value for name, value in values.items() if name != "messages"}
    return render(
        tokenizer.template_for(values.get("tools")),
        values["messages"],
        add_generation_prompt=add_generation_prompt,
        **variables,
    )


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested mappings and lists, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _guarded(value: Any, names: Sequence[str], guard: str) -> Any:
    """The value with `guard` after the first character of each control token's name in a text."""
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            value = value.replace(name, name[0] + guard + name[1:])
        return value
    if isinstance(value, Mapping):
        guarded = {}
        for key, item in value.items():
            guarded[_guarded(key, names, guard)] = _guarded(item, names, guard)
        return guarded
    if isinstance(value, list | tuple):
        return [_guarded(item, names, guard) for item in value]
    return value
