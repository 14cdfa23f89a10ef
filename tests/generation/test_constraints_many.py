"""A thousand schemas and two hundred regular expressions, followed by a model of random weights.

With GPTJAX_GUIDED=PATH the checkpoint at PATH follows them too, with fewer tokens each. `-s` shows
the counts as they grow. XLA_FLAGS=--xla_force_host_platform_device_count=8 compiles as users do:
the tests' own programs are twenty times as slow.
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

pytestmark = pytest.mark.slow
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


def schemas():
    """JSON schemas: nested, with enums, patterns, formats and bounds, some unfulfillable."""
    size, number = st.integers(0, 8), st.integers(-2000, 2000)
    fraction = st.floats(-100, 100).map(lambda x: round(x, 3))
    value = (
        st.text('ab é日😀"\\\n', max_size=6)
        | st.integers(-(2**53), 2**53)
        | st.none()
        | st.booleans()
    )

    def typed(name, fixed=(), **optional):
        return st.fixed_dictionaries({"type": st.just(name), **dict(fixed)}, optional=optional)

    plain = st.one_of(
        typed("string", minLength=size, maxLength=size),
        typed("string", {"pattern": st.sampled_from(PATTERNS)}),
        typed("string", {"format": st.sampled_from(FORMATS)}),
        typed("integer", minimum=number, maximum=number),
        typed("integer", exclusiveMinimum=number, multipleOf=st.sampled_from([1, 3, 10])),
        typed("number", minimum=fraction, exclusiveMaximum=fraction),
        typed("boolean"),
        typed("null"),
        st.fixed_dictionaries({"enum": st.lists(value, min_size=1, max_size=4)}),
        st.fixed_dictionaries({"const": value}),
    )

    def nested(inner):
        names = st.sampled_from(NAMES)
        return st.one_of(
            typed("array", {"items": inner}, minItems=size, maxItems=size),
            typed(
                "object",
                {"properties": st.dictionaries(names, inner, max_size=5)},
                required=st.lists(names, unique=True, max_size=3),
                additionalProperties=st.booleans(),
            ),
            st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
        )

    return st.recursive(plain, lambda inner: nested(inner) | nested(plain), max_leaves=12)


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
    classes = st.sampled_from(["[a-d]", "[^a-y]", "[0-9]", r"[é-ü]", ".", "[日本😀]", "[^é]"])
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
        if seed % 100 == 0:
            print(f"{seed} of {len(asked)}: {dict(ends)}", flush=True)
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
    lm, limit = model()
    asked = [dict(schema=schema) for schema in drawn(schemas(), SCHEMAS)]
    ends = follow(lm, limit, asked, check_json)
    print(f"\n{len(asked)} schemas: {dict(ends)}")
    assert ends["stop"] > SCHEMAS / 2
    asked = [dict(regex=regex) for regex in drawn(expressions(), EXPRESSIONS)]
    ends = follow(lm, limit, asked, check_expression)
    print(f"{len(asked)} regular expressions: {dict(ends)}")
    assert ends["stop"] > EXPRESSIONS / 2
