"""Calls of tools in what a model wrote.

Templates ask for them in like forms: JSON objects with a name and arguments (or parameters), alone,
in a list or in tags. What is none of it, or names no given tool, is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.config.errors import UserError
from gptjax.generation.constraints import schema_term
from gptjax.serving.served import new_id

MAY_BEGIN = re.compile(r"[{\[<]")  # a call
# Keywords that name further properties, which a closed object would not allow.
_COMBINING = {
    *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "patternProperties", "dependentSchemas"),
    *("dependencies", "unevaluatedProperties"),
}
_TAG = re.compile(r"</?tool_calls?>|\[TOOL_CALLS\]|<\|python_tag\|>|[\s;]+")


Tool = Mapping[str, Any]  # in OpenAI's form


class Parsed(NamedTuple):
    content: str
    calls: list[dict[str, Any]]


def grammar(tools: Sequence[Tool]) -> str:
    """Of one call of one of these tools, as `read_forced` reads it. Raises UserError."""
    calls = []
    for tool in tools:
        arguments = schema_term(arguments_schema(tool))
        calls.append(f'{json.dumps(_begin(tool))} {arguments} "}}"')
    return f"start: {' | '.join(calls)}"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Of an object; where properties are named, and no more is said about them, of these alone.

    Without parameters it has none, as OpenAI says. Raises UserError.
    """
    parameters = tool["function"].get("parameters") or {"properties": {}}
    if parameters.get("type", "object") != "object":
        raise UserError(f"parameters are of type {parameters['type']!r:.80}, and must be an object")
    is_closed = "properties" in parameters and not parameters.keys() & _COMBINING
    closed = {"additionalProperties": False} if is_closed else {}
    return {"type": "object", **closed, **parameters}


def read_forced(text: str, tools: Sequence[Tool], *, whole: bool) -> Parsed:
    """The call that a text of `grammar` is; not `whole`: one whose arguments were cut."""
    for tool in tools:
        begin = _begin(tool)
        if text.startswith(begin):
            arguments = text[len(begin) : -1 if whole else None]
            return Parsed("", [_call(tool["function"]["name"], arguments)])
    return Parsed(text, [])


def _begin(tool: Tool) -> str:
    return f'{{"name": {json.dumps(tool["function"]["name"])}, "arguments": '


def parse(text: str, names: Collection[str]) -> Parsed:
    """The text before the calls, and the calls in OpenAI's form; all is text where there are none.

    >>> parse('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', ["add"]).content
    ''
    """
    for start in MAY_BEGIN.finditer(text):
        calls = _read_calls(text[start.start() :], names)
        if calls:
            return Parsed(text[: start.start()].rstrip(), calls)
    return Parsed(text, [])


def _read_calls(text: str, names: Collection[str]) -> list[dict[str, Any]]:
    """The calls that the text consists of; none where it holds anything else."""
    decoder, calls, at = json.JSONDecoder(), list[dict[str, Any]](), 0
    while at < len(text):
        if tag := _TAG.match(text, at):
            at = tag.end()
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _read_call(item, names)
            if call is None:
                return []
            calls.append(call)
    return calls


def _read_call(item: Any, names: Collection[str]) -> dict[str, Any] | None:
    if not isinstance(item, dict):
        return None
    item = item.get("function", item)
    if not isinstance(item, dict) or item.get("name") not in names:
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except ValueError:  # a number too large
            return None
    return _call(item["name"], arguments)


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": new_id("call"), "type": "function", "function": function}
