"""The tuned lens starts as the logit lens, comes nearer to the output, and never goes further."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.core import tree
from gptjax.generation import tracing
from gptjax.generation.language_model import LanguageModel
from gptjax.interpretability import tuned_lens
from gptjax.model import head
from gptjax.model.layers import Norm


@pytest.fixture(scope="module")
def lm():
    """Blocks that change a lot, so that the logit lens is far off."""
    small = tiny_language_model("llama", layers=2, context=32)
    blocks = jax.tree.map(lambda leaf: 3 * leaf, small.params["blocks"])
    return LanguageModel(small.config, {**small.params, "blocks": blocks}, None)


def text(seed, length=1600):
    return np.random.default_rng(seed).integers(0, 264, length).tolist()


@pytest.fixture(scope="module")
def lens(lm):
    return tuned_lens.fit(lm, text(0))


def divergence(lm, states, output):
    """Mean KL(output || states), by their definitions."""
    config, params = lm._model.config, lm._model.params

    def log_odds(state):
        normed = Norm(config).apply({"params": params["final_norm"]}, state)
        return jax.nn.log_softmax(head.unembed(config, params, normed))

    a, b = log_odds(output), log_odds(states)
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def states_of(lm, seed):
    tokens = np.asarray(text(seed, 64)).reshape(2, 32)
    states = jax.jit(tuned_lens._states, static_argnums=0)
    return np.asarray(states(*tracing.computation(lm), tokens))


def test_without_a_fit_it_is_the_logit_lens(lens):
    states = np.random.default_rng(1).standard_normal((3, 5, 32)).astype(np.float32)
    start = dataclasses.replace(lens, maps=0 * lens.maps, biases=0 * lens.biases)
    assert (start.translate(states) == states).all()


def test_it_is_nearer_to_the_output_on_text_that_it_has_not_seen(lm, lens):
    assert lens.maps.shape == (2, 32, 32) and lens.biases.shape == (2, 32)
    states = states_of(lm, 7)
    moved = lens.translate(states)
    assert (moved[-1] == states[-1]).all()
    for layer in range(2):
        before = divergence(lm, states[layer], states[-1])
        after = divergence(lm, moved[layer], states[-1])
        assert after < 0.9 * before
        # as the held-out part of the fitted text said
        assert (lens.before[layer], lens.after[layer]) == pytest.approx((before, after), rel=0.4)


def test_what_later_layers_add_is_found():
    """Blocks that add the same vector to every position, whatever they read."""
    small = tiny_language_model("gpt2", layers=1, context=32)
    flat = {path: np.array(leaf) for path, leaf in tree.flatten(small.params).items()}
    for path in flat:
        if path.startswith("blocks/"):
            flat[path] *= 0
    added = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    flat["blocks/mlp/down/bias"][0] = added
    lens = tuned_lens.fit(LanguageModel(small.config, tree.nested(flat), None), text(3))
    np.testing.assert_allclose(lens.biases[0], added, atol=0.05)
    assert lens.after[0] < 0.01 * lens.before[0]


def test_a_map_that_does_not_help_is_left_out(lm, monkeypatch):
    noise = np.random.default_rng(0).standard_normal((33, 32)).astype(np.float32)
    monkeypatch.setattr(tuned_lens, "_solve", lambda inner, outer: 9 * noise)
    lens = tuned_lens.fit(lm, text(0, 512))
    assert lens.after == lens.before and not lens.maps.any() and not lens.biases.any()


def test_it_is_kept_in_a_file_for_its_own_model(lm, lens, tmp_path):
    lens.save(tmp_path / "lens.npz")
    again = tuned_lens.load(tmp_path / "lens.npz", lm)
    assert (again.maps == lens.maps).all() and (again.biases == lens.biases).all()
    assert (again.before, again.after) == (lens.before, lens.after)
    other = tiny_language_model("llama", layers=2, context=32)
    with pytest.raises(UserError, match="fitted to another model"):
        tuned_lens.load(tmp_path / "lens.npz", other)


def test_a_short_text_is_refused(lm):
    with pytest.raises(UserError, match="needs a text of 64 tokens, and this one has 63"):
        tuned_lens.fit(lm, text(0, 63))
