"""Calls of tools in what a model wrote.

Templates ask for them in like forms: JSON objects with a name and arguments (or parameters), alone,
in a list or in tags. What is none of it, or names no given tool, is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.generation.constraints import schema_term
from gptjax.serving.served import new_id

MAY_BEGIN = re.compile(r"[{\[<]")  # a call
_TAG = re.compile(r"</?tool_calls?>|\[TOOL_CALLS\]|<\|python_tag\|>|[\s;]+")


class Parsed(NamedTuple):
    content: str
    calls: list[dict[str, Any]]


def grammar(tools: Sequence[Mapping[str, Any]]) -> str:
    """Of one call of one of these tools, as `parse` reads it. Raises UserError."""
    calls = []
    for tool in tools:
        function = tool["function"]
        begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        arguments = schema_term({"type": "object", **(function.get("parameters") or {})})
        calls.append(f'{json.dumps(begin)} {arguments} "}}"')
    return f"start: {' | '.join(calls)}"


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
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": item["name"], "arguments": arguments}
    return {"id": new_id("call"), "type": "function", "function": function}
