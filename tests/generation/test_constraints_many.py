"""A thousand schemas and two hundred regular expressions, followed by a model of random weights.

With GPTJAX_GUIDED=PATH the checkpoint at PATH follows them too, with fewer tokens each; `-s` shows
the counts.
"""

import collections
import json
import os
import re

import jsonschema
import pytest
from helpers import tiny_language_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config.errors import UserError
from gptjax.generation.constraints import build_guide
from gptjax.generation.options import GenerationOptions
from gptjax.tokenizer.trained import ByteTokenizer, SentencePieceTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.parity]
SCHEMAS, EXPRESSIONS = 1000, 200
TEXT = ['{"name": "fox", "age": 12.5, "naïve": ["quick", "brown 😀", true, null]}\n'] * 30
NAMES = ["a", "name", "größe", "日本", "x y", 'q"uote', "back\\slash", "😀"]
PATTERNS = [
    "^[a-c]{1,4}$",
    "^(cat|dög)+$",
    "^\\d{3}-\\d{2}$",
    "^x",
    "[0-9]$",
    "^[^a-z]{2,5}$",
    "é+",
]
FORMATS = ["date", "uuid", "ipv4", "email", "time"]


def with_type(name, **properties):
    return {
        "type": "object",
        "properties": {"type": {"const": name}, **properties},
        "required": ["type"],
        "additionalProperties": False,
    }


def schema_of_schemas(depth):
    """What hypothesis-jsonschema makes schemas of: nested at most so deep."""
    size = {"type": "integer", "minimum": 0, "maximum": 8}
    number = {"type": "integer", "minimum": -2000, "maximum": 2000}
    fraction = {"type": "number", "minimum": -100, "maximum": 100}
    value = {"type": ["string", "integer", "boolean", "null"], "maxLength": 6}
    plain = [
        with_type("string", minLength=size, maxLength=size),
        with_type("string", pattern={"enum": PATTERNS}) | {"required": ["type", "pattern"]},
        with_type("string", format={"enum": FORMATS}) | {"required": ["type", "format"]},
        with_type("integer", minimum=number, maximum=number),
        with_type("integer", exclusiveMinimum=number, multipleOf={"enum": [1, 3, 10]}),
        with_type("number", minimum=fraction, exclusiveMaximum=fraction),
        with_type("boolean"),
        with_type("null"),
        {
            "type": "object",
            "properties": {"enum": {"type": "array", "items": value, "minItems": 1, "maxItems": 4}},
            "required": ["enum"],
            "additionalProperties": False,
        },
    ]
    if not depth:
        return {"anyOf": plain}
    inner = schema_of_schemas(depth - 1)
    some = dict.fromkeys(NAMES, inner)
    names = {"type": "array", "items": {"enum": NAMES}, "uniqueItems": True, "maxItems": 3}
    variants = {"type": "array", "items": inner, "minItems": 1, "maxItems": 3}
    nested = [
        with_type("array", items=inner, minItems=size, maxItems=size) | {"required": ["items"]},
        with_type(
            "object",
            properties={"type": "object", "properties": some, "additionalProperties": False},
            required=names,
            additionalProperties={"enum": [True, False]},
        )
        | {"required": ["type", "properties", "required"]},
        {
            "type": "object",
            "properties": {"anyOf": variants},
            "required": ["anyOf"],
            "additionalProperties": False,
        },
    ]
    return {"anyOf": [*nested, *nested, *plain]}


def drawn(strategy, count):
    """So many different values, the same in each run."""
    values = {}

    @settings(
        max_examples=3 * count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value):
        values.setdefault(json.dumps(value), value)

    draw()
    assert len(values) >= count
    return list(values.values())[:count]


def expressions():
    escape = st.text('ab 1é日😀.*\\"', min_size=1, max_size=3).map(re.escape)
    classes = st.sampled_from(["[a-d]", "[^a-y]", r"\d", r"[é-ü]", ".", "[日本😀]", r"\w"])
    counts = st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,3}", "{0,4}"])

    def grown(inner):
        groups = st.lists(inner, min_size=1, max_size=3).map(lambda p: f"(?:{'|'.join(p)})")
        return st.lists(st.tuples(groups | classes, counts), min_size=1, max_size=3).map(
            lambda parts: "".join(part + count for part, count in parts)
        )

    return st.recursive(escape | classes, grown, max_leaves=8)


def toy():
    tokenizer = SentencePieceTokenizer.train(TEXT, 300)
    return tiny_language_model(tokenizer=tokenizer, vocab=320, context=256), 160


def checkpoint():
    path = os.environ.get("GPTJAX_GUIDED")
    if not path:
        pytest.skip("GPTJAX_GUIDED names no checkpoint")
    return gptjax.load(path, weights="int8"), 48


def is_prefix(text, options):
    """Whether a text is the beginning of one that is right, byte by byte."""
    state = build_guide(ByteTokenizer(), 257, [256], options).start()
    for byte in text:
        if state.ended:
            return False
        state.accept(byte)
    return not state.fault


def follow(lm, limit, asked, check):
    """How the texts end. asked: options; check(option, text) raises where a text is wrong."""
    ends = collections.Counter()
    for seed, option in enumerate(asked):
        options = GenerationOptions(**option, temperature=1.0, seed=seed, max_new_tokens=limit)
        try:
            completion = lm.generate([[5, 6, 7]], options)[0]
        except UserError as error:
            ends["refused: " + re.sub(r"[-\d.]+|\(at.*", "", str(error))[:60]] += 1
            continue
        ends[completion.finish_reason] += 1
        text = lm.tokenizer.decode_bytes(completion.tokens)
        if completion.finish_reason == "stop":
            check(option, text.decode())
        else:
            assert is_prefix(text, options), (option, text)
    return ends


def check_json(option, text):
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    schema = option["schema"]
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def check_expression(option, text):
    assert re.fullmatch(option["regex"], text), (option, text)


@pytest.mark.parametrize("model", [toy, checkpoint])
def test_what_finishes_is_valid_and_what_is_cut_is_the_beginning_of_it(model):
    hypothesis_jsonschema = pytest.importorskip("hypothesis_jsonschema")
    lm, limit = model()
    schemas = drawn(hypothesis_jsonschema.from_schema(schema_of_schemas(2)), SCHEMAS)
    ends = follow(lm, limit, [dict(schema=schema) for schema in schemas], check_json)
    print(f"\n{len(schemas)} schemas: {dict(ends)}")
    assert ends["stop"] > SCHEMAS / 2
    asked = [dict(regex=regex) for regex in drawn(expressions(), EXPRESSIONS)]
    ends = follow(lm, limit, asked, check_expression)
    print(f"{len(asked)} regular expressions: {dict(ends)}")
    assert ends["stop"] > EXPRESSIONS / 2
