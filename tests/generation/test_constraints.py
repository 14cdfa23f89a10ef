"""Text that follows a grammar: masks against brute force, and texts that are what was asked for."""

import dataclasses
import datetime
import functools
import json
import re

import jsonschema
import numpy as np
import pytest
from helpers import tiny_language_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import UserError
from gptjax.generation import constraints, guided
from gptjax.generation.constraints import build_guide
from gptjax.generation.guided import pass_width
from gptjax.generation.options import GenerationOptions
from gptjax.generation.slots import Job, SlotEngine
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.openai import OpenAITokenizer
from gptjax.tokenizer.pretrained import from_gpt2
from gptjax.tokenizer.trained import ByteTokenizer, CharTokenizer, SentencePieceTokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", "naïve 😀"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TEXT = ["The quick brown fox jumps over the lazy dog, 12 times: \"a\", 'b', naïve 😀.\n"] * 30


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model(tokenizer=ByteTokenizer(), context=128)


def tokenizers():
    gpt2 = OpenAITokenizer.find("gpt2", "")
    return {
        "bytes": ByteTokenizer(),
        "gpt2": gpt2,
        "tokenizer.json": from_gpt2(gpt2),
        "sentencepiece": SentencePieceTokenizer.train(TEXT, 300),
        "chars": CharTokenizer.train(['abcdefgh "{}:,0123456789\n']),
    }


@pytest.fixture(scope="module")
def vocabularies():
    return tokenizers()


def allowed_ids(state, vocab_size):
    row = np.zeros(-(-vocab_size // 32), np.uint32)
    state.write_mask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "tokenizer.json", "sentencepiece", "chars"])
def test_masks_are_those_of_brute_force(vocabularies, kind):
    """A token is allowed if and only if a sentence goes on from it; where all sentences go on
    alike, tokens that the tokenizer would write are forced."""
    tokenizer: Tokenizer = vocabularies[kind]
    vocab_size = tokenizer.vocab_size + 37  # rows that only fill up the model's table
    sentences = ["a bad cab", "a bad", "abc", "cab", "ca\n", "had a cab: 10", "had a cab: 12"]
    if kind != "chars":
        sentences += ["naïve", "naive", "😀", "😃"]
    wanted = [sentence.encode() for sentence in sentences]
    options = GenerationOptions(choices=sentences)
    guide = build_guide(tokenizer, vocab_size, tokenizer.eos_ids, options)
    pieces = enumerate(tokenizer.token_bytes)
    pieces = [(i, piece) for i, piece in pieces if piece and any(piece in s for s in wanted)]
    prefixes = {b""}
    seen = 0
    while prefixes:
        prefix = prefixes.pop()
        state, text = guide.start(), b""
        # reach the prefix by tokens that the masks allow, the longest first
        while text != prefix:
            rest = prefix[len(text) :]
            ids = allowed_ids(state, vocab_size)
            fitting = [i for i in ids if i < tokenizer.vocab_size]
            fitting = [i for i in fitting if rest.startswith(tokenizer.token_bytes[i] or b"\xff")]
            if not fitting:
                break
            token = max(fitting, key=lambda i: (len(tokenizer.token_bytes[i]), i))
            text += tokenizer.token_bytes[token]
            state.accept(token)
        if text != prefix:
            continue
        expected = set(tokenizer.eos_ids) if prefix in wanted else set()
        for i, piece in pieces:
            if any(sentence.startswith(prefix + piece) for sentence in wanted):
                expected.add(i)
        ids, forced = allowed_ids(state, vocab_size), state.forced()
        if forced:
            assert ids <= expected and forced[0] in ids
        else:
            assert ids == expected
        seen += 1
        assert state.finished == (expected <= set(tokenizer.eos_ids))
        for i in expected - set(tokenizer.eos_ids):
            prefixes.add(prefix + tokenizer.token_bytes[i])
    assert seen > 15


def test_words_are_no_longer_than_their_expression_lets_them(vocabularies):
    """Words are what the library takes together from the vocabulary."""
    tokenizer = vocabularies["gpt2"]
    beginning = re.compile(r"[a-z]{0,12}|[a-z]{2,12} [a-z]{0,5}|[a-z]{2,12} [a-z]{1,5}!")
    options = GenerationOptions(regex="[a-z]{2,12} [a-z]{1,5}!")
    guide = build_guide(tokenizer, 50257, tokenizer.eos_ids, options)
    pieces = [piece.decode("latin-1") for piece in tokenizer.token_bytes]
    for text in ("", "a", "some", "sometimes", "some th", "some thing"):
        state = guide.start()
        for byte in text.encode():
            state.accept(tokenizer.token_bytes.index(bytes([byte])))
        expected = {i for i, p in enumerate(pieces) if p and beginning.fullmatch(text + p)}
        assert allowed_ids(state, 50257) == expected


def test_each_program_of_a_guided_text_is_looked_up_once(lm, monkeypatch):
    names, program = [], executables.Call.program
    monkeypatch.setattr(
        executables.Call, "program", lambda call: names.append(call.jitted) or program(call)
    )
    assert len(lm.generate("x", regex="[a-c]{20}", max_new_tokens=30).tokens) == 20
    assert sorted(jitted.__name__ for jitted in names) == ["choose", "forward"]


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.text('ab ñ😀\n"\\', max_size=6), min_size=1, max_size=6), data=st.data())
def test_any_walk_along_the_masks_ends_in_a_choice(vocabularies, words, data):
    for tokenizer in (vocabularies["bytes"], vocabularies["sentencepiece"]):
        options = GenerationOptions(choices=words)
        state = build_guide(tokenizer, 400, tokenizer.eos_ids, options).start()
        tokens = []
        while not state.finished:
            assert not state.fault
            token = data.draw(st.sampled_from(sorted(allowed_ids(state, 400))))
            state.accept(token)
            tokens.append(token)
        assert tokenizer.decode_bytes(tokens).decode() in words


def test_what_is_asked_for_comes(lm):
    for seed in range(4):
        asked = dict(temperature=1.0, seed=seed, max_new_tokens=110)
        person = lm.generate("A person:", schema=PERSON, **asked)
        assert person.finish_reason == "stop"
        jsonschema.validate(json.loads(person.text), PERSON)
        assert len(person.tokens) == len(person.logprobs)
        assert re.fullmatch("[a-c]{3,5}x?", lm.generate("x", regex="[a-c]{3,5}x?", **asked).text)
        assert lm.generate("x", choices=["yes", "né\n", '"'], **asked).text in ["yes", "né\n", '"']
        nested = lm.generate("x", grammar='start: "(" start ")" | "."', **asked).text
        assert nested == "(" * nested.count("(") + "." + ")" * nested.count("(")


def test_in_slots_a_text_is_what_it_is_alone_whatever_is_beside_it(lm):
    """Its neighbours follow other grammars or none; long forced parts are fed in one pass."""
    asked = [
        dict(schema=PERSON),
        dict(),
        dict(regex="[a-c]{3,5}x?"),
        dict(choices=["a very long choice", "another one"]),
        dict(schema=PERSON, max_new_tokens=20),
        dict(regex=""),
    ]
    jobs = []
    for i, options in enumerate(asked):
        options = {"max_new_tokens": 80, "temperature": 1.0, "seed": i, **options}
        jobs.append(Job(lm.encode("x" * (1 + 9 * i)), GenerationOptions(**options), alternatives=2))
    alone = [lm.generate([job.prompt], job.options)[0] for job in jobs]
    engine = SlotEngine(lm, slots=4)
    waiting, texts = list(jobs), []
    while waiting or engine.free < 4:
        while waiting and engine.free:
            texts.append(engine.enter(waiting.pop(0)))
        engine.turn()
    for text, completion in zip(texts, alone, strict=True):
        assert text.sequence.text == completion.text
        assert text.sequence.reason == completion.finish_reason
        np.testing.assert_allclose(text.sequence.logprobs, completion.logprobs, atol=1e-4)
        assert [len(pairs) for pairs in text.alternatives] == [2] * len(completion.tokens)


def test_in_slots_forced_tokens_take_a_pass_of_their_own_whoever_begins_beside_them(lm):
    """In the same places, so that a text's numbers are the same bits."""
    options = GenerationOptions(regex="[a-c]{3}xyzxyzxyzxyzx[0-9]{9}", max_new_tokens=30)
    job, other = Job([5, 6, 7], options), Job([7, 8], GenerationOptions(max_new_tokens=3))
    fed = []
    for enters in (None, 0, 1, 2):
        engine, places = SlotEngine(lm, slots=2), []
        feed = engine._prefill
        engine._prefill = lambda *args, feed=feed, places=places: (
            places.append(args[2]) or feed(*args)
        )
        text, turn = engine.enter(job), 0
        while not text.sequence.reason:
            if turn == enters:
                engine.enter(other)
            engine.turn()
            turn += 1
        fed.append([place for place in places if place > 3])
    assert fed[0] and fed == [fed[0]] * 4


def test_in_slots_nothing_is_fed_to_a_text_that_its_stop_text_ended(lm):
    options = GenerationOptions(regex="ab(c){40}", stop=["abc"], max_new_tokens=60)
    engine = SlotEngine(lm, slots=1)
    text = engine.enter(Job([5, 6, 7], options))
    while not text.sequence.reason:
        engine.turn()
    assert text.sequence.text == "" and engine.free == 1
    assert len(text.sequence.tokens) == len(text.alternatives) == 3


def test_a_text_takes_as_many_steps_as_tokens_also_to_its_stop_text(lm, monkeypatch):
    steps, step = [], guided.GuidedWriter._step
    monkeypatch.setattr(
        guided.GuidedWriter, "_step", lambda self, *a: steps.append(1) or step(self, *a)
    )
    asked = dict(regex="[a-z]{60}", temperature=1.0, seed=5, max_new_tokens=40)
    text = lm.generate("x", **asked).text
    assert len(steps) == len(text) == 40
    assert "".join(lm.stream("x", **asked)) == text and len(steps) == 80
    cut = lm.generate("x", **asked, stop=text[3:6])
    assert cut.text == text[: text.find(text[3:6])] and len(steps) == 80 + len(cut.tokens)


def test_log_probabilities_are_the_models_own_of_forced_tokens_too(lm):
    prompt = lm.encode("x")
    completion = lm.generate([prompt], choices=["a long choice", "another one"])[0]
    scores = lm.token_logprobs([prompt + completion.tokens])[0]
    np.testing.assert_allclose(completion.logprobs, scores.logprobs, atol=1e-4)


@pytest.mark.parametrize("together", [1, 256])
def test_a_text_does_not_depend_on_which_forced_tokens_share_a_pass(lm, together, monkeypatch):
    """Tokens, however many a pass takes; and passes of several tokens are as few as pay."""
    ops = dataclasses.replace(IMPLEMENTATIONS["cpu"], tokens_of_a_pass=together)
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", ops)
    widths, extend = [], guided.extend
    monkeypatch.setattr(
        guided, "extend", lambda *a, **k: widths.append(a[6].shape[1]) or extend(*a, **k)
    )
    asked = dict(schema=PERSON, temperature=1.0, max_new_tokens=80, seed=3)
    texts = [completion.text for completion in lm.generate(["a", "bcd"], **asked)]
    assert texts == [lm.generate("a", **asked).text, lm.generate("bcd", **asked | {"seed": 4}).text]
    assert set(widths) == (set() if together == 1 else {4, 16})
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_a_pass_of_several_tokens_must_save_more_than_it_costs(lm):
    config = lm._model.config
    widths = [pass_width([count], config) for count in (0, 1, 2, 4, 5, 9)]
    assert widths == [0, 0, 4, 4, 4, 16]
    assert pass_width([4] + [0] * 7, config) == pass_width([16] * 8, config) == 0


def test_the_mask_has_the_first_forced_token_alone(vocabularies):
    """So the tokens are those of the tokenizer, whether they come in one pass or one by one."""
    tokenizer = vocabularies["gpt2"]
    options = GenerationOptions(choices=["b wonderful choice", "another"])
    state = build_guide(tokenizer, 50257, tokenizer.eos_ids, options).start()
    state.accept(tokenizer.encode("b")[0])
    forced = state.forced()
    assert tokenizer.decode(forced).startswith(" wonderful")
    assert allowed_ids(state, 50257) == {forced[0]}


def test_rows_have_states_of_their_own_and_a_text_is_what_it_is_alone(lm):
    asked = dict(schema=PERSON, temperature=1.0, max_new_tokens=80)
    together = lm.generate(["a", "bcd", "efghijk"], n=2, seed=5, **asked)
    assert len({completion.text for completion in together}) > 3
    alone = lm.generate(["bcd"], n=2, seed=6, **asked)
    assert [c.text for c in together[2:4]] == [c.text for c in alone]


def test_nothing_lifts_what_a_grammar_bans(lm):
    """Other processors may ban every token that it allows: then it alone decides."""
    asked = dict(regex="[ab]{6}", max_new_tokens=9)
    for other in (
        dict(banned=["a", "b"]),
        dict(no_repeat_ngram=1),
        dict(no_repeat_ngram=1, temperature=1.0, top_k=1),
        dict(logit_bias={ord("z"): 1e6}),
        dict(min_new_tokens=9),
        dict(temperature=2.0, top_p=0.1, min_p=0.5, typical_p=0.2, repetition_penalty=3.0),
    ):
        text = lm.generate("ab", **asked, **other).text
        assert re.fullmatch("[ab]{6}", text), (other, text)
    assert lm.generate("x", regex="a|ab+", min_new_tokens=3, max_new_tokens=9).text.startswith(
        "abb"
    )


def test_ends(lm):
    def end(**options):
        completion = lm.generate("x", **options)
        return completion.text, completion.finish_reason

    assert end(choices=["abcdef"], max_new_tokens=3) == ("abc", "length")
    assert end(choices=["abcdef"], max_new_tokens=6) == ("abcdef", "stop")
    assert end(choices=["abcdef"], stop="cd") == ("ab", "stop")
    assert end(choices=["ab"], ignore_end=True) == ("ab", "stop")
    assert end(choices=["ab", "ac"], stop_tokens=[ord("c")]) == ("ab", "stop")
    assert end(regex="") == ("", "stop")
    endless = dict(regex="(ab)+", max_new_tokens=300, overflow="slide", ignore_end=True)
    assert end(**endless) == ("ab" * 150, "length")
    assert "".join(lm.stream("x", choices=["né 😀"])) == "né 😀"
    lm.compile("x", choices=["ab", "b"])


def accepts(schema, value):
    """Whether a value, as JSON, follows a schema to its end."""
    options = GenerationOptions(schema=schema)
    state = build_guide(ByteTokenizer(), 257, [256], options).start()
    for byte in json.dumps(value).encode():
        if byte not in allowed_ids(state, 257):
            return False
        state.accept(byte)
    return state.finished or 256 in allowed_ids(state, 257)


@pytest.mark.parametrize("year", ["0000", "0001", "1900", "2000", "2023", "2024", "9996", "9999"])
def test_dates_are_days_of_the_calendar(year):
    """The library alone takes every year for a leap year, and the year 0000."""
    schema = {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]}
    for day in ("01-01", "02-28", "02-29", "02-30", "04-30", "04-31", "12-31", "13-01", "00-10"):
        date = f"{year}-{day}"
        try:
            is_day = bool(datetime.date.fromisoformat(date))
        except ValueError:
            is_day = False
        assert accepts(schema, date) == is_day
        time = {"type": "string", "format": "date-time", "minLength": 5}
        assert accepts(time, f"{date}T12:30:00Z") == is_day


def test_dates_are_looked_for_in_schemas_alone():
    data = {"format": "date"}
    assert accepts({"enum": [data], "const": data}, data)
    named = {"type": "object", "properties": {"format": {"type": "integer"}, "enum": data}}
    assert accepts(named, {"format": 3, "enum": "2024-02-29"})
    assert not accepts(named, {"format": 3, "enum": "2023-02-29"})
    assert not accepts({"anyOf": ({"type": "null"}, {"type": "string", **data})}, "2023-02-29")


def test_a_vocabulary_that_cannot_go_on_ends_a_text_as_a_limit_does(capsys):
    lm = tiny_language_model(tokenizer=CharTokenizer.train(["abc"]), vocab=4)
    with pytest.raises(UserError, match="no text that the vocabulary can write"):
        lm.generate("a", choices=["abx"])
    completion = lm.generate("a", choices=["abx", "aby"], max_new_tokens=9)
    assert (completion.text, completion.finish_reason) == ("ab", "length")
    assert "ends before its grammar does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(regex="a("), "regex: unclosed group"),
        (dict(regex=r"\b"), "regex: lookarounds not supported"),
        (dict(schema={"properties": {"q": {"items": {"not": {}}}}}), r'"not".*/properties/q/items'),
        (dict(schema="{"), "schema: no JSON.*line 1 column 2"),
        (dict(schema={"type": "integer", "minimum": 5, "maximum": 3}), "minimum .5. is greater"),
        (dict(schema=False), "no JSON schema"),
        (dict(schema=functools.reduce(lambda inner, _: {"not": inner}, range(2000), {})), "deeply"),
        (dict(schema='{"not": ' * 200 + "{}" + "}" * 200), "deeply"),
        (dict(schema="[" * 100_000), "deeply"),
        (dict(schema={"enum": [1, -(2**53) - 1]}), "-9007199254740993 is no integer"),
        (dict(grammar="start: x"), r"grammar: at 1\(8\): unknown name"),
        (dict(grammar="start: start"), "no text that"),
        (dict(grammar="start: <|endoftext|>"), "unknown special token"),
        (dict(grammar="start: <[256]>"), "no token"),
        (dict(choices=[]), "choices"),
        (dict(choices="ab"), "choices"),
        (dict(choices=["a", 1]), "choices: 1"),
        (dict(regex=3), "regex"),
        (dict(regex="a", choices=["a"]), "regex and choices"),
        (dict(regex="a", num_beams=2), "beam search"),
        (dict(regex="a", num_speculative_tokens=2), "speculation"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(lm, options, message):
    with pytest.raises(UserError, match=message):
        lm.generate("x", **options)


def test_tokens_without_bytes_are_refused(monkeypatch):
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "joins_bytes", False)
    with pytest.raises(UserError, match="decodes words"):
        build_guide(tokenizer, 257, [256], GenerationOptions(regex="a"))
    with pytest.raises(UserError, match="needs a tokenizer"):
        build_guide(None, 257, [256], GenerationOptions(regex="a"))


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"gptjax\[guide\]"):
        build_guide(ByteTokenizer(), 257, [256], GenerationOptions(regex="a"))


def test_a_grammar_is_compiled_once():
    tokenizer, options = ByteTokenizer(), GenerationOptions(schema=PERSON)
    guides = [build_guide(tokenizer, 257, [256], options) for _ in range(2)]
    assert guides[0] is guides[1]
    assert constraints._compiled.cache_info().maxsize
