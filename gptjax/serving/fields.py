"""The fields of each request: names, JSON schemas, meanings. One table for the check of a request
(`check`), the OpenAPI description (`openapi.py`) and the documentation.

To add a field: a row in a table here, and its use in `completions.py`, `chat.py` or
`embeddings.py`. A field that is refused says why; null is "not given" everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.errors import nearest
from gptjax.core.characters import shorten
from gptjax.generation.options import GenerationOptions
from gptjax.serving.errors import ApiError, wrong_field
from gptjax.tokenizer.messages import REASONING

Schema = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a request's body.

    schema: JSON schema of its value, of the words that `_problem` knows.
    refused: why any value is refused but those in `unless`, which mean nothing is wanted.
    """

    schema: Schema
    meaning: str
    required: bool = False
    refused: str = ""
    unless: Sequence[Any] = ()


Table = Mapping[str, Field]


def check(body: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The given fields, all of them right; nulls are left out. Raises ApiError."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        field = table.get(name)
        if field is None:
            near = nearest(name, [n for n, f in table.items() if not f.refused])
            hint = f": did you mean {near!r}?" if near else ""
            raise ApiError(
                400,
                f"there is no field {shorten(name)!r}{hint}",
                param=shorten(name),
                code="unknown_field",
            )
        if field.refused:
            if value not in field.unless:
                raise ApiError(
                    400, f"{name}: {field.refused}", param=name, code="unsupported_field"
                )
        elif problem := _problem(value, field.schema, name):
            raise wrong_field(*problem)
    for name, field in table.items():
        if field.required and name not in given:
            raise ApiError(400, f"{name} is missing", param=name, code="missing_field")
    return {name: _without_nulls(value, table[name].schema) for name, value in given.items()}


_TYPES: Mapping[str, Any] = {
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "number": (int, float),
    "integer": int,
}


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def _problem(value: Any, schema: Schema, where: str) -> tuple[str, str] | None:
    """(field, what is wrong with it); None where the value is as the schema says."""
    if "anyOf" in schema:
        problems = [_problem(value, option, where) for option in schema["anyOf"]]
        if None in problems:
            return None
        of_type = [
            problem
            for problem, option in zip(problems, schema["anyOf"])
            if _is_type(value, option.get("type", "object"))
        ]
        if len(of_type) == 1:
            return of_type[0]
        return where, f"{where} is {_show(value)}: it must be {schema['description']}"
    if "enum" in schema and value not in schema["enum"]:
        choices = ", ".join(map(str, schema["enum"]))
        return where, f"{where} is {_show(value)}: there are {choices}"
    kind = schema.get("type")
    if kind and not _is_type(value, kind):
        return where, f"{where} is {_show(value)}: it must be of type {kind}"
    if kind in ("number", "integer"):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not low <= value <= high:
            return where, f"{where} is {_show(value)}: it must be from {low:,} to {high:,}"
    for least, most, unit, sized in (
        ("minLength", "maxLength", "characters", str),
        ("minItems", "maxItems", "items", list),
        ("minProperties", "maxProperties", "keys", dict),
    ):
        if isinstance(value, sized):
            low, high = schema.get(least, 0), schema.get(most, len(value))
            if not low <= len(value) <= high:
                bound = f"at least {low}" if len(value) < low else f"at most {high:,}"
                return where, f"{where} has {len(value):,} {unit}: it must have {bound}"
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            if problem := _problem(item, schema["items"], f"{where}[{i}]"):
                return problem
    if isinstance(value, dict):
        return _problem_of_object(value, schema, where)
    return None


def _problem_of_object(
    value: Mapping[str, Any], schema: Schema, where: str
) -> tuple[str, str] | None:
    known = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            return f"{where}.{name}", f"{where}.{name} is missing"
    pattern = schema.get("propertyNames", {}).get("pattern")
    for name, item in value.items():
        path = f"{where}.{shorten(name)}"
        if pattern and not re.fullmatch(pattern, name):
            return path, f"{where} has the key {shorten(name)!r}: {schema['description']}"
        if name in known:
            nothing = item is None and name not in schema.get("required", ())
            problem = None if nothing else _problem(item, known[name], path)
        elif others is False:
            return path, f"there is no field {path!r}"
        else:
            problem = None if others is True else _problem(item, others, path)
        if problem:
            return problem
    return None


def _show(value: Any) -> str:
    """The beginning of a value; a large one is not written out for it."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    value = value[:100] if isinstance(value, str) else value
    return shorten(json.dumps(value, ensure_ascii=False))


def _without_nulls(value: Any, schema: Schema) -> Any:
    """An object of settings without those that are null."""
    if isinstance(value, dict) and "properties" in schema:
        return {name: item for name, item in value.items() if item is not None}
    return value


_RANGES = {
    field.name: (field.metadata["range"], field.metadata["meaning"])
    for field in dataclasses.fields(GenerationOptions)
    if field.metadata.get("range")
}


def number(name: str, meaning: str = "", *, option: str = "", **limits: Any) -> Field:
    """A field that is a number of `GenerationOptions`, whose range it has."""
    numbers, words = _RANGES[option or name]
    kind = "number" if isinstance(numbers.low, float) else "integer"
    schema = {"type": kind, "minimum": numbers.low, "maximum": numbers.high, **limits}
    return Field(schema, meaning or words)


def text(meaning: str, **limits: Any) -> Field:
    return Field({"type": "string", **limits}, meaning)


def flag(meaning: str) -> Field:
    return Field({"type": "boolean"}, meaning)


def closed(required: Sequence[str], **properties: Schema) -> Schema:
    """Of an object with these keys alone."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def refused(why: str, *unless: Any) -> Field:
    return Field({}, why, refused=why, unless=unless)


TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
IDS: Schema = {"type": "array", "items": TOKEN_ID, "minItems": 1}
TEXTS_OR_IDS: Schema = {
    "description": "a text, a list of texts, a list of token ids, or a list of such lists",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2048},
        IDS,
        {"type": "array", "items": IDS, "minItems": 1, "maxItems": 2048},
    ],
}
_MODEL = Field(
    {"type": "string"}, "a model's `id` from /v1/models; not given: the checkpoint itself"
)
_NO_EFFECT = "a name for the caller's own records; without effect here"
_TOKENS = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": 256}

SAMPLING: Table = {
    "model": _MODEL,
    "temperature": number("temperature", "0: the most likely token; 1 where it is not given"),
    **{name: number(name) for name in ("top_p", "top_k", "min_p", "typical_p")},
    "presence_penalty": number("presence_penalty"),
    "frequency_penalty": number("frequency_penalty"),
    "repetition_penalty": number("repetition_penalty"),
    "no_repeat_ngram": number("no_repeat_ngram"),
    "min_tokens": number("min_tokens", option="min_new_tokens"),
    "seed": Field(
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        "same seed, same text; not given: another one each time",
    ),
    "stop": Field(
        {
            "description": "a text, or up to four",
            "anyOf": [
                _STOP_TEXT,
                {"type": "array", "items": _STOP_TEXT, "maxItems": 4},
            ],
        },
        "the text ends before the first of these",
    ),
    "stop_token_ids": Field(
        {"type": "array", "items": TOKEN_ID, "maxItems": 256}, "further tokens that end a text"
    ),
    "ignore_eos": flag("go on after the model's own end tokens"),
    "logit_bias": Field(
        {
            "type": "object",
            "description": "token ids, with a number for each",
            "propertyNames": {"pattern": "[0-9]{1,9}"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 4096,
        },
        "added to the logits of tokens, by id",
    ),
    "n": Field({"type": "integer", "minimum": 1, "maximum": 128}, "answers to each prompt"),
    "stream": flag("server-sent events: pieces of the text as they come"),
    "stream_options": Field(
        {
            "type": "object",
            "properties": {"include_usage": {"type": "boolean"}},
            "additionalProperties": False,
        },
        "include_usage: a last event with the number of tokens",
    ),
    "user": text(_NO_EFFECT),
    "response_format": Field(
        closed(
            ["type"],
            type={"enum": ["text", "json_object", "json_schema"]},
            json_schema=closed(
                ["schema"],
                name={"type": "string"},
                description={"type": "string"},
                schema={"type": "object"},
                strict={"type": "boolean"},
            ),
        ),
        "json_object: an object; json_schema: JSON by `json_schema.schema`, always strictly",
    ),
    "guided_json": Field(
        {"description": "a JSON schema", "anyOf": [{"type": "object"}, {"type": "string"}]},
        "the text is JSON by this schema",
    ),
    "guided_regex": text("the text matches this regular expression"),
    "guided_choice": Field(
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2048},
        "the text is one of these",
    ),
    "guided_grammar": text("the text follows this grammar, written in Lark"),
}

COMPLETIONS: Table = {
    "prompt": Field(TEXTS_OR_IDS, "what is continued", required=True),
    **SAMPLING,
    "max_tokens": Field({**_TOKENS, "minimum": 0}, "tokens to write (16)"),
    "logprobs": Field(
        {"type": "integer", "minimum": 0, "maximum": 5},
        "log-probabilities of the tokens, and so many alternatives of each",
    ),
    "echo": flag("the prompt before the text"),
    "best_of": Field(
        {"type": "integer", "minimum": 1, "maximum": 128},
        "so many texts are written, and the n most likely ones (by mean log-probability) returned",
    ),
    "suffix": refused("models here write on, and do not fill in between two texts", ""),
}

_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "description": "a text, or a list of parts of type text",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "object"}, "minItems": 1},
            ],
        },
        "name": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
        # what an answer has beside them, for conversations that go on
        **{name: {"type": "string"} for name in ("refusal", *REASONING)},
        "annotations": {"type": "array"},
        **{name: {"type": "object"} for name in ("audio", "function_call")},
    },
    "additionalProperties": False,
}
_TOOL: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"enum": ["function"]},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 64},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
                "strict": {"type": "boolean"},
            },
        },
    },
}
_TEXT_ONLY = "models here read and write text alone"

CHAT: Table = {
    "messages": Field(
        {"type": "array", "items": _MESSAGE, "minItems": 1},
        "the conversation, for the checkpoint's own template",
        required=True,
    ),
    **SAMPLING,
    "max_tokens": Field(_TOKENS, "tokens to write; not given: as many as the context allows"),
    "max_completion_tokens": Field(_TOKENS, "the newer name of max_tokens"),
    "logprobs": flag("log-probabilities of the tokens"),
    "top_logprobs": Field(
        {"type": "integer", "minimum": 0, "maximum": 20}, "so many alternatives of each token"
    ),
    "tools": Field(
        {"type": "array", "items": _TOOL, "maxItems": 128},
        "functions that the answer may call, where the checkpoint's template reads tools",
    ),
    "tool_choice": Field(
        {
            "description": "'none', 'auto', 'required' or a tool by its name",
            "anyOf": [
                {"type": "string", "enum": ["none", "auto", "required"]},
                closed(
                    ["type", "function"],
                    type={"enum": ["function"]},
                    function=closed(["name"], name={"type": "string"}),
                ),
            ],
        },
        "none: the tools are not shown to the model; required, or a tool: the answer is one call",
    ),
    "metadata": Field({"type": "object"}, _NO_EFFECT),
    "safety_identifier": text(_NO_EFFECT),
    "prompt_cache_key": text("without effect: equal beginnings are reused in any case"),
    "parallel_tool_calls": flag("false is for answers that `tool_choice` makes one call"),
    "modalities": refused(_TEXT_ONLY, ["text"]),
    "audio": refused(_TEXT_ONLY),
    "prediction": refused("guesses of the answer are not used"),
    "reasoning_effort": refused("how long a model thinks is not set here"),
    "verbosity": refused("how long an answer is, the prompt says"),
    "service_tier": refused("there is one", "auto", "default"),
    "store": refused("answers are not stored", False),
    "web_search_options": refused("this server searches nothing"),
    "functions": refused("this older field is now `tools`", []),
    "function_call": refused("this older field is now `tool_choice`", "auto", "none"),
}

EMBEDDINGS: Table = {
    "input": Field(TEXTS_OR_IDS, "what is embedded", required=True),
    "model": _MODEL,
    "encoding_format": Field(
        {"enum": ["float", "base64"]}, "numbers, or the bytes of float32 numbers in base64"
    ),
    "dimensions": refused("a vector has as many numbers as the model is wide"),
    "user": text(_NO_EFFECT),
}
