"""Tokens drawn with given probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.categorical import draw

COUNT = 20_000


def drawn(logits, seed=0):
    keys = jax.random.split(jax.random.key(seed), COUNT)
    one = jax.jit(lambda key: draw(jnp.asarray(logits, jnp.float32)[None], key[None])[0])
    return np.asarray(jax.lax.map(one, keys, batch_size=1000))


@pytest.mark.parametrize("vocab_size", [3, 256, 700])
def test_tokens_come_as_often_as_their_probabilities_say(vocab_size):
    random = np.random.default_rng(0)
    logits = 2 * random.standard_normal(vocab_size)
    banned = random.permutation(vocab_size)[: vocab_size // 3]
    logits[banned] = -np.inf
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    counts = np.bincount(drawn(logits), minlength=vocab_size)
    assert not counts[banned].any()
    likely = COUNT * probs > 5
    chi_squared = ((counts - COUNT * probs)[likely] ** 2 / (COUNT * probs[likely])).sum()
    freedom = likely.sum()
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)
    if vocab_size > 256:  # each group of tokens as often as it should be, too
        assert abs(counts[:256].sum() / COUNT - probs[:256].sum()) < 0.02


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary():
    logits = np.full(300, -np.inf)
    assert 0 <= drawn(logits)[0] < 300
    logits[299] = 0.0
    assert set(drawn(logits)) == {299}
    logits[7] = np.inf
    assert set(drawn(logits)) == {7}


def test_a_rounding_of_the_logits_changes_no_token():
    """So that a seed gives one text on different devices and in batches of different sizes."""
    logits = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    rounded = logits * (1 + 1e-6 * np.random.default_rng(1).choice([-1, 1], 3000))
    assert (drawn(logits) != drawn(rounded)).sum() <= 2
