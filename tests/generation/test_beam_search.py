"""Beam search against an exhaustive search."""

import itertools

import jax
import numpy as np
import pytest
from helpers import PROMPTS, tiny_language_model


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model()


def test_beam_search_finds_the_best_sequence(lm):
    """With as many beams as tokens it is exhaustive enough to check every pair by hand."""
    small = tiny_language_model(vocab=9, context=16)
    completions = small.generate([[1, 2]], max_new_tokens=2, num_beams=9, n=3, length_penalty=0.0)
    scores = {}
    for pair in itertools.product(range(9), repeat=2):
        logp = jax.nn.log_softmax(small.logits([[1, 2, *pair]])[0])
        scores[pair] = float(logp[1, pair[0]] + logp[2, pair[1]])
    best = sorted(scores, key=scores.get, reverse=True)[:3]
    assert [tuple(c.tokens) for c in completions] == best
    np.testing.assert_allclose([c.score for c in completions], [scores[b] for b in best], atol=1e-4)
    np.testing.assert_allclose(
        [sum(c.logprobs) for c in completions], [scores[b] for b in best], atol=1e-4
    )
    alone = lm.generate([PROMPTS[1]], max_new_tokens=8, num_beams=3)[0]
    assert lm.generate(PROMPTS, max_new_tokens=8, num_beams=3)[1].tokens == alone.tokens
