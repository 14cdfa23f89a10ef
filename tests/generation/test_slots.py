"""Continuous batching: a text in a slot is what the same request gets alone."""

import dataclasses

import numpy as np
import pytest
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.generation.options import GenerationOptions
from gptjax.generation.slots import Job, SlotEngine

LENGTHS = (3, 40, 33, 1, 90, 200, 64, 65, 32, 20)
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.2, "top_k": 40, "min_p": 0.01},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "min_new_tokens": 4},
    {"no_repeat_ngram": 2, "banned": [[5], [7, 8]], "logit_bias": {9: 2.0}},
)


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model("llama", context=512, layers=2)


@pytest.fixture(scope="module")
def jobs():
    random = np.random.default_rng(0)
    jobs = []
    for i, length in enumerate(LENGTHS):
        settings = SETTINGS[i % len(SETTINGS)]
        options = GenerationOptions(max_new_tokens=9 + 3 * i, seed=i, **settings)
        jobs.append(
            Job(random.integers(0, 264, length).tolist(), options, alternatives=3 * (i % 2))
        )
    return jobs


def run(engine, jobs, arrivals=None):
    """The texts of the jobs, each of which comes in its turn, or as soon as a slot is free."""
    waiting = sorted(zip(arrivals or [0] * len(jobs), range(len(jobs)), strict=True))
    texts, turn = {}, 0
    while waiting or any(not text.sequence.reason for text in texts.values()):
        while waiting and waiting[0][0] <= turn and engine.free:
            number = waiting.pop(0)[1]
            texts[number] = engine.enter(jobs[number])
        engine.turn()
        turn += 1
    return [texts[i] for i in range(len(jobs))]


def test_texts_are_those_of_generate(lm, jobs):
    engine = SlotEngine(lm, slots=4)
    texts = run(engine, jobs, [0, 0, 1, 2, 2, 3, 8, 9, 9, 9])
    assert engine.free == 4
    for job, text in zip(jobs, texts, strict=True):
        alone = lm.generate([job.prompt], job.options)[0]
        assert text.sequence.tokens == alone.tokens
        assert text.sequence.reason == alone.finish_reason
        np.testing.assert_allclose(text.sequence.logprobs, alone.logprobs, atol=1e-4)
        assert [len(pairs) for pairs in text.alternatives] == [job.alternatives] * len(alone.tokens)


def test_a_slot_refuses_what_it_cannot_do(lm):
    engine = SlotEngine(lm, slots=2, length=64)
    job = Job([1, 2, 3], GenerationOptions(max_new_tokens=4))
    for wrong, message in (
        (dict(n=2), "n is an option of generate"),
        (dict(num_beams=2), "num_beams"),
        (dict(overflow="slide"), "overflow"),
        (dict(max_new_tokens=600), "exceed the model's context of 512"),
        (dict(max_new_tokens=70), "the 64 tokens that a slot holds"),
        (dict(logit_bias={1000: 1.0}), "outside the vocabulary"),
    ):
        options = dataclasses.replace(job.options, **wrong)
        with pytest.raises(UserError, match=message):
            engine.check(dataclasses.replace(job, options=options))
    with pytest.raises(UserError, match="adapter"):
        engine.check(dataclasses.replace(job, adapter="fox"))
    with pytest.raises(UserError, match="alternatives"):
        engine.check(dataclasses.replace(job, alternatives=21))
    texts = [engine.enter(job) for _ in range(2)]
    with pytest.raises(UserError, match="no slot"):
        engine.enter(job)
    engine.leave(texts[0])
    assert engine.free == 1
