"""response_format and the guided fields, over real slots."""

import json
import re

import jsonschema
import pytest
from helpers import tiny_language_model
from known_engine import TEMPLATE, Server

from gptjax.generation.slots import SlotEngine
from gptjax.tokenizer.trained import ByteTokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "none": {"const": None}},
    "required": ["name", "none"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    lm = tiny_language_model("llama", tokenizer=ByteTokenizer(), context=256)
    lm.tokenizer.chat_template = TEMPLATE
    with Server(SlotEngine(lm, slots=2)) as server:
        yield server


def test_texts_are_what_the_fields_ask_for(server):
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = server.chat(response_format=shape, max_tokens=80).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["message"]["content"]), SCHEMA)
    for body, pattern in (
        (dict(guided_regex="[a-c]{3}"), "[a-c]{3}"),
        (dict(guided_choice=["yes", "no"]), "yes|no"),
        (dict(guided_grammar='start: "x" | "y"'), "x|y"),
        (dict(guided_json={"type": "boolean"}), "true|false"),
        (dict(guided_json='{"type": "null"}'), "null"),
        (dict(response_format={"type": "json_object"}, max_tokens=1), "{"),
    ):
        text = server.complete(**body).json()["choices"][0]["text"]
        assert re.fullmatch(pattern, text), (body, text)
    pieces = server.stream("/v1/completions", prompt="hi", guided_choice=["né 😀"])
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "né 😀"
    plain = server.complete(response_format={"type": "text"}, max_tokens=2)
    assert plain.status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (dict(guided_regex="a("), "guided_regex", "unclosed group"),
        (dict(guided_json={"type": "nonsense"}), "guided_json", "nonsense"),
        (dict(guided_json={"properties": {"a": {"not": {}}}}), "guided_json", "/properties/a"),
        (dict(guided_regex="a", guided_choice=["b"]), "guided_regex and guided_choice", "one of"),
        (dict(response_format={"type": "json_schema"}), "response_format.json_schema", "missing"),
        (dict(response_format={"type": "xml"}), "response_format.type", "xml"),
        (dict(guided_choice=[]), "guided_choice", "guided_choice"),
    ],
)
def test_what_is_wrong_is_refused_by_name(server, body, param, message):
    response = server.complete(**body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"]
