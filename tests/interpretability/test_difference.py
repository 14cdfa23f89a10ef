"""Two checkpoints that differ in what a test planted: that is found, and nothing else."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from conftest import make_config, tiny_checkpoint
from helpers import PROMPTS, adapters_for, tiny_language_model

from gptjax.checkpoints import peft
from gptjax.config.errors import UserError
from gptjax.core import tree
from gptjax.generation.language_model import LanguageModel
from gptjax.interpretability import difference

PROMPT = PROMPTS[1]


@pytest.fixture(scope="module")
def first():
    return tiny_language_model("llama", layers=2)


def changed(lm, edit, **settings):
    """A model whose {path: array} `edit` has changed."""
    flat = {path: np.array(leaf) for path, leaf in tree.flatten(lm.params).items()}
    edit(flat)
    config = dataclasses.replace(lm.config, **settings)
    return LanguageModel(config, tree.nested(flat), lm.tokenizer)


def test_a_model_is_no_different_from_itself(first):
    result = difference.compare(first, first, PROMPT)
    assert (result.settings, result.unmatched, result.moved, result.reason) == ((), (), [], "")
    assert len(result.tensors) == 2 * len(tree.flatten(first.params["blocks"])) + 3
    assert [p.divergence for p in result.predictions] == [0.0] * len(PROMPT)
    for prediction in result.predictions:
        assert prediction.first == prediction.second and len(prediction.tokens) == 5


def test_the_tensors_that_moved_are_named_with_their_layers(first):
    def edit(flat):
        flat["blocks/mlp/down/kernel"][1] *= 1.25
        flat["final_norm/scale"][0] += 0.5 * np.linalg.norm(flat["final_norm/scale"])

    result = difference.compare(first, changed(first, edit), PROMPT)
    moved = [(t.path, t.layer, pytest.approx(t.relative, rel=1e-5)) for t in result.moved]
    assert moved == [("final_norm/scale", None, 0.5), ("blocks/mlp/down/kernel", 1, 0.25)]
    assert all(p.divergence > 0 for p in result.predictions)


def test_predictions_that_changed_are_found_where_they_did(first):
    """Only the embedding of one token moved, so that all before it is as it was."""
    ids = [5, 9, 30, 200, 7]

    def edit(flat):
        flat["embed/tokens"][200] += 1.0

    second = changed(first, edit)
    result = difference.compare(first, second, ids)
    assert [p.divergence > 0 for p in result.predictions] == [False, False, False, True, True]
    last = result.predictions[3]
    for lm, odds in ((first, last.first), (second, last.second)):
        logits = lm.logits([ids])[0, 3].astype(np.float64)
        probability = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(odds, probability[list(last.tokens)], rtol=1e-5)
        assert set(np.argsort(-probability)[:5]) <= set(last.tokens)
    a, b = (lm.logits([ids])[0, 3].astype(np.float64) for lm in (first, second))
    a, b = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
    assert last.divergence == pytest.approx((np.exp(a) * (a - b)).sum(), rel=1e-5)


def test_from_zero_is_infinitely_far():
    assert difference.relative_change(np.zeros(3), np.ones(3)) == math.inf
    assert difference.relative_change(np.zeros(3), np.zeros(3)) == 0


def test_an_adapter_changes_the_layers_that_it_targets(first, tmp_path):
    config = make_config(lora=dict(rank=2), train=dict(init_from="base"))
    config = dataclasses.replace(config, model=first.config)
    adapters = adapters_for(config, first.params, scale=0.3)
    peft.write_adapter(tmp_path, first.config, config.lora, adapters, "base")
    result = difference.compare(first, difference.load_other(tmp_path, first), PROMPT)
    targets = {path.removesuffix("/lora_a") for path in tree.flatten(adapters) if "lora_a" in path}
    assert {t.path.removesuffix("/kernel") for t in result.moved} == targets
    assert {t.layer for t in result.moved} == {0, 1}
    assert max(p.divergence for p in result.predictions) > 1e-3


def test_an_export_in_fewer_bits_is_near(tmp_path):
    checkpoint = tiny_checkpoint("llama", vocab=264, layers=2)
    first = LanguageModel(checkpoint.config, checkpoint.params, None, source=checkpoint)
    first.save(tmp_path / "half", dtype="float16")
    second = difference.load_other(tmp_path / "half", first)
    result = difference.compare(first, second, PROMPT)
    assert not result.settings and not result.unmatched and len(result.moved) > 10
    assert 1e-5 < result.moved[0].relative < 1e-3
    assert 0 < max(p.divergence for p in result.predictions) < 1e-4


def test_another_vocabulary_is_said_and_its_predictions_are_left_out(first):
    def edit(flat):
        flat["embed/tokens"] = flat["embed/tokens"][:128]

    result = difference.compare(first, changed(first, edit, vocab_size=120), PROMPT[:1])
    assert result.unmatched[0].startswith("embed/tokens: ((120, 32), 'float32') instead of")
    assert result.reason == "the vocabularies have 264 and 120 tokens" and not result.predictions
    assert result.settings == (("vocab_size", 264, 120),)


def test_another_setting_is_named(first):
    second = changed(first, lambda flat: None, rope_theta=500.0)
    result = difference.compare(first, second, PROMPT)
    assert result.settings == (("rope_theta", first.config.rope_theta, 500.0),)
    assert not result.moved and result.predictions[-1].divergence > 0


def test_models_of_different_shapes_are_refused(first):
    with pytest.raises(UserError, match=r"different shapes: blocks/\S+: .* and \d+ more"):
        difference.compare(first, tiny_language_model("llama", layers=1), PROMPT)
    with pytest.raises(UserError, match=r"different shapes: .*extra blocks/"):
        difference.compare(first, tiny_language_model("qwen2", layers=2), PROMPT)


def test_tensors_are_compared_as_they_are_stored(first):
    stored = jax.tree.map(np.asarray, first.params)
    table = stored["embed"]["tokens"]
    assert table.shape[0] > first.config.vocab_size  # with padding, that is no part of the model

    def edit(flat):
        flat["embed/tokens"][first.config.vocab_size :] += 7.0

    assert not difference.compare(first, changed(first, edit), PROMPT).moved
