"""Heads that were built to do something are found by what they look at."""

import jax
import numpy as np
import pytest
from conftest import make_config, random_params
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.tracing import ablate_head
from gptjax.interpretability.heads import score_heads
from gptjax.interpretability.patching import patch_paths

TOKENS, CONTEXT, SHARP = 64, 32, 80.0


def induction_model():
    """Two layers of attention alone: head 0 of the first copies the token before into columns of
    its own, and head 1 of the second finds there the token that it stands on, and copies that
    place's own token; head 0 of the second finds the same token."""
    width = 2 * TOKENS + CONTEXT  # a column for each token, each position, each token before
    shape = dict(width=width, heads=2, head_dim=TOKENS, mlp_dim=4, bias="none", norm="rmsnorm")
    sizes = dict(layers=2, vocab_size=TOKENS, vocab_multiple=1, context=CONTEXT, mlp="relu")
    config = make_config(model=dict(shape, **sizes)).model
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), random_params(config))
    blocks = params["blocks"]
    for norm in (params["final_norm"], blocks["norm1"], blocks["norm2"]):
        norm["scale"] += 1
    token, before = np.eye(TOKENS), slice(TOKENS + CONTEXT, width)
    params["embed"]["tokens"][:, :TOKENS] = token
    params["embed"]["positions"][:, TOKENS : TOKENS + CONTEXT] = np.eye(CONTEXT)
    qkv, out = blocks["attn"]["qkv"]["kernel"], blocks["attn"]["out"]["kernel"]
    position = np.arange(CONTEXT)
    qkv[0, TOKENS + position[1:], 0, 0, position[:-1]] = SHARP  # asks for the position before
    qkv[0, TOKENS + position, 0, 1, position] = 1
    qkv[0, :TOKENS, 0, 2] = token
    out[0, 0, :, before] = token
    for number, key in ((0, slice(TOKENS)), (1, before)):
        qkv[1, :TOKENS, number, 0] = token * SHARP
        qkv[1, key, number, 1] = token
    qkv[1, :TOKENS, 1, 2] = token
    out[1, 1, :, :TOKENS] = 10 * token
    return LanguageModel(config, params, None)


def test_a_planted_induction_head_is_found():
    lm = induction_model()
    scores = score_heads(lm, length=12)
    assert scores.induction.shape == (2, 2)
    for kind, place in (("previous_token", (0, 0)), ("induction", (1, 1))):
        best, second = scores.highest(kind, 2)
        assert best[:2] == place and best[2] > 0.8 and second[2] < 0.2, (kind, best, second)
    (best, *_) = scores.highest("duplicate_token", 1)
    assert best[:2] == (1, 0) and 0.4 < best[2] < 0.6  # itself and its first occurrence

    text = [5, 9, 33, 2, 60, 17, 5, 9, 33]
    predicted = lambda *changes: int(lm.trace(text, interventions=changes)["logits"][-1].argmax())
    assert predicted() == 2  # as the text went on before
    assert predicted(ablate_head(1, 0)) == 2
    assert predicted(ablate_head(1, 1)) != 2 and predicted(ablate_head(0, 0)) != 2

    # the first layer's head acts through the keys of the second's
    other = [5, 9, 8, 2, 60, 17, 5, 9, 33]
    paths = patch_paths(lm, other, text, 2, receivers=[("keys", 1, 1)])
    assert paths.restored[0, 0] == pytest.approx(1, abs=0.05)
    assert abs(paths.restored.ravel()[1:]).max() < 1e-3


def test_a_context_that_is_too_short_is_refused():
    with pytest.raises(UserError, match="40 tokens twice need 80 positions"):
        score_heads(tiny_language_model(), length=40)
