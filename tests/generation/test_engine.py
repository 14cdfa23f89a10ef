"""The engine: what it writes is what a full forward pass would choose, for every row alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import ROOT, byte_level_tokenizer
from helpers import PROMPTS, greedy_tokens, tiny_language_model

from gptjax.config.errors import UserError
from gptjax.generation import loop as decode_loop


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama3", "mistral", "qwen3"])
def test_greedy_is_the_argmax_of_a_full_forward_pass(family):
    lm = tiny_language_model(family, layers=2)
    for prompt, got in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=6), strict=True):
        assert got.tokens == greedy_tokens(lm, prompt, 6)
        assert got.finish_reason == "length"
        logits = lm.logits([[*prompt, *got.tokens]])[0]
        expected = jax.nn.log_softmax(logits)[
            np.arange(len(prompt) - 1, len(prompt) + 5), got.tokens
        ]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


def test_a_request_does_not_depend_on_its_batch_mates(lm):
    settings = dict(max_new_tokens=12, temperature=1.3, top_p=0.95, repetition_penalty=1.1)
    together = lm.generate(PROMPTS, seed=40, **settings)
    for i in (3, 0, 2):
        assert lm.generate([PROMPTS[i]], seed=40 + i, **settings)[0].tokens == together[i].tokens
    assert lm.generate([PROMPTS[0]], seed=41, **settings)[0].tokens != together[0].tokens
    several = lm.generate(PROMPTS[:2], n=3, seed=40, **settings)
    assert len({tuple(c.tokens) for c in several[:3]}) == 3
    assert several[0].tokens == together[0].tokens and several[3].tokens == together[1].tokens


def test_every_row_stops_by_itself(lm):
    free = lm.generate(PROMPTS, max_new_tokens=20)
    stop = free[1].tokens[4]
    for alone, c in zip(
        free, lm.generate(PROMPTS, max_new_tokens=20, stop_tokens=[stop]), strict=True
    ):
        at = alone.tokens.index(stop) if stop in alone.tokens else 20
        assert c.tokens == alone.tokens[:at]
        assert c.finish_reason == ("stop" if at < 20 else "length")
    assert dataclasses.asdict(free[0])["prompt_logprobs"] is None


def test_text_slides_past_the_context():
    lm = tiny_language_model(context=32)
    with pytest.raises(UserError, match="overflow='slide'"):
        lm.generate(PROMPTS, max_new_tokens=100)
    completions = lm.generate(PROMPTS, max_new_tokens=100, overflow="slide")
    assert [len(c.tokens) for c in completions] == [100] * 4
    assert completions[0].tokens[:29] == lm.generate(PROMPTS[:1], max_new_tokens=29)[0].tokens
    assert (
        lm.generate([PROMPTS[2]], max_new_tokens=100, overflow="slide")[0].tokens
        == completions[2].tokens
    )
    # the context is full: its latest half is fed again
    window = [*PROMPTS[2], *completions[2].tokens][: 32 + 1][-16:]
    assert completions[2].tokens[32:36] == greedy_tokens(lm, window, 4)


def test_penalties_and_least_lengths_outlive_a_slide():
    lm = tiny_language_model(context=32)
    sliding = dict(max_new_tokens=60, overflow="slide", stop_tokens=[7], logit_bias={7: 1e4})
    assert len(lm.generate([[1] * 20], min_new_tokens=30, **sliding)[0].tokens) == 30
    often = lm.generate([[1] * 20], max_new_tokens=28, overflow="slide", presence_penalty=1e5)[
        0
    ].tokens
    assert len(set(often[12:])) == 16  # of those still in sight


def test_the_last_slot_of_the_context_counts(lm):
    """Beams and scores may end one token past the last that is fed."""
    prompt = [1] * 10
    beams = lm.generate([prompt], max_new_tokens=55, num_beams=2)[0]
    assert len(beams.tokens) == 55 == len(beams.logprobs)
    assert lm.score([prompt], [beams.tokens])[0][0] == pytest.approx(sum(beams.logprobs), abs=1e-3)
    assert lm.score([prompt], [[]]) == [(0.0, True)]


def test_a_model_may_know_more_tokens_than_its_tokenizer():
    lm = tiny_language_model(vocab=300, tokenizer=byte_level_tokenizer())
    for beams in (1, 2):
        completion = lm.generate("ab", max_new_tokens=4, num_beams=beams, logit_bias={290: 50.0})
        assert completion.tokens == [290] * 4 and completion.text == ""


def test_a_hundred_prompt_lengths_take_six_programs():
    lm = tiny_language_model("llama", context=256)
    programs = lambda: (
        decode_loop.prefill.compiled()._cache_size() + decode_loop.advance.compiled()._cache_size()
    )
    before = programs()
    for n in range(1, 101):
        lm.generate([list(range(n))], max_new_tokens=2)
    assert programs() - before <= 6


def test_buckets_hold_what_they_must():
    for context in (17, 64, 1024, 8192):
        sizes = {decode_loop.bucket(n, context, 32) for n in range(1, context + 1)}
        assert len(sizes) <= 4
        assert all(decode_loop.bucket(n, context, 32) >= n for n in range(1, context + 1))
        assert all(size % 32 == 0 for size in sizes)


GOLDEN = json.loads((ROOT / "tests" / "golden" / "generation.json").read_text())


NAMES = {"no_repeat_ngram_size": "no_repeat_ngram", "eos_token_id": "stop_tokens"}


@pytest.mark.parametrize("family", GOLDEN["families"])
def test_golden_numbers_of_transformers(family):
    """Made by tests/golden/make.py; the parity tests compare with the library itself."""
    lm, golden = tiny_language_model(family, layers=2), GOLDEN["families"][family]
    np.testing.assert_allclose(
        lm.logits([GOLDEN["prompts"][1]])[0, -1, :32], golden["logits"], atol=1e-4
    )
    for name, settings in GOLDEN["settings"].items():
        options = {NAMES.get(key, key): value for key, value in settings.items()}
        for expected, got in zip(
            golden[name], lm.generate(GOLDEN["prompts"], max_new_tokens=12, **options), strict=True
        ):
            assert got.tokens == (
                expected[:-1] if expected[-1] in settings.get("eos_token_id", []) else expected
            ), name
