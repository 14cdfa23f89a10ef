"""Heads are replaced one at a time by their means, and the change is that of the prediction."""

import jax
import numpy as np
from helpers import PROMPTS, tiny_language_model

from gptjax.generation.tracing import ablate_head
from gptjax.interpretability.ablation import ablate_heads


def test_each_head_is_ablated_as_alone():
    lm = tiny_language_model("llama", layers=2)
    trace, target = lm.trace(PROMPTS[1]), 17
    changes = ablate_heads(lm, trace, target, position=-2)
    assert changes.shape == (2, 4)
    whole = jax.nn.log_softmax(trace["logits"])[-2, target]
    for layer in range(2):
        for number in range(4):
            without = ablate_head(layer, number, mean=[trace])
            other = lm.trace(PROMPTS[1], interventions=[without])
            alone = jax.nn.log_softmax(other["logits"])[-2, target] - whole
            np.testing.assert_allclose(changes[layer, number], alone, atol=2e-6)
    assert np.abs(changes).max() > 1e-3
