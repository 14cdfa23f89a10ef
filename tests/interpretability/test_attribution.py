"""Parts of a logit add up to it; scores of tokens add up to what the prompt changes."""

import numpy as np
import pytest
from conftest import FAMILIES
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.interpretability.attribution import direct_logits, token_attribution
from gptjax.interpretability.lens import logit_lens

PROMPT = [200, 1, 7, 7, 40, 41, 60, 3, 100]
QUICK = ("gpt2", "gemma2")
SOME = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("name", SOME)
def test_the_parts_of_a_logit_add_up_to_it(name):
    lm = tiny_language_model(name, layers=2)
    trace = lm.trace(PROMPT, names=["embedding", "heads", "mlp_output", "residual_after", "logits"])
    for target, against, position in ((5, None, -1), (5, 77, 4)):
        direct = direct_logits(lm, trace, target, against=against, position=position)
        logits = trace["logits"][position]
        expected = logits[target] - (0 if against is None else logits[against])
        assert direct.logit == pytest.approx(expected, abs=1e-4)
        assert direct.total == pytest.approx(expected, abs=1e-4)
        assert sum(value for _, value in direct.rows()) == pytest.approx(expected, abs=1e-4)
        assert direct.heads.shape == (2, 4) and abs(direct.heads).min() > 0
        if lm.config.bias == "none":
            assert not direct.attention_bias.any() and not direct.norm_bias


def test_a_head_alone_writes_its_row():
    """Without head 2 of the last layer, the logit lacks its row (before the norm's divisor)."""
    lm = tiny_language_model("llama", layers=2)
    trace = lm.trace(PROMPT, names=["embedding", "heads", "mlp_output", "residual_after"])
    direct = direct_logits(lm, trace, 9)
    arrays = dict(trace)
    arrays["heads"] = trace["heads"].copy()
    arrays["heads"][1, :, 2] = 0
    without = direct_logits(lm, type(trace)(trace.tokens, trace.texts, arrays), 9)
    changed = direct.heads - without.heads
    assert changed[1, 2] == pytest.approx(direct.heads[1, 2])
    changed[1, 2] = 0
    np.testing.assert_allclose(changed, 0, atol=1e-6)
    assert direct.total - without.total == pytest.approx(direct.heads[1, 2], abs=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_integrated_gradients_are_complete(name):
    lm = tiny_language_model(name, layers=2)
    result = token_attribution(lm, PROMPT, 5, against=77)
    logits = lm.logits([PROMPT])[0, -1]
    assert result.logit == pytest.approx(logits[5] - logits[77], abs=1e-4)
    change = result.logit - result.baseline
    assert abs(result.scores.sum() - change) <= 0.01 * abs(change) + 1e-5
    assert result.error <= 0.01 and result.scores.shape == (len(PROMPT),)


@pytest.mark.slow
def test_a_gradient_times_the_input_is_the_slope_along_it():
    lm = tiny_language_model("gpt2", layers=2)
    result = token_attribution(lm, PROMPT, 5, method="gradient")
    for at in (0, 3, 8):

        def larger(name, value, layer, at=at, by=0.0):
            return value.at[:, at].multiply(1 + by) if name == "embedding" else value

        up, down = (
            lm.trace(
                PROMPT,
                names=["logits"],
                interventions=[lambda n, v, i, by=by: larger(n, v, i, by=by)],
            )["logits"][-1, 5]
            for by in (1e-2, -1e-2)
        )
        assert result.scores[at] == pytest.approx((up - down) / 2e-2, rel=0.02, abs=2e-3)


@pytest.mark.slow
def test_tokens_behind_the_position_have_no_part_in_it():
    lm = tiny_language_model("llama", layers=2)
    for method in ("gradient", "integrated"):
        result = token_attribution(lm, PROMPT, 5, position=3, method=method)
        assert not result.scores[4:].any() and result.scores[:4].all()
        assert result.logit == pytest.approx(lm.logits([PROMPT])[0, 3, 5], abs=1e-4)


def test_the_last_state_of_the_lens_is_the_model():
    lm = tiny_language_model("gemma2", layers=2, vocab=264)
    trace = lm.trace(PROMPT)
    readings = logit_lens(lm, trace, top=3)
    assert readings.tokens.shape == (3, 9, 3)
    logits = trace["logits"].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-logits, axis=-1)[:, :3]
    np.testing.assert_array_equal(readings.tokens[-1], best)
    expected = np.take_along_axis(probabilities, best, -1)
    np.testing.assert_allclose(readings.probabilities[-1], expected, rtol=1e-4)
    np.testing.assert_array_equal(readings.targets, best[:, 0])
    assert not readings.ranks[-1].any() and readings.ranks[0].any()
    np.testing.assert_allclose(
        readings.entropy[-1], -(probabilities * np.log(probabilities)).sum(-1), rtol=1e-4
    )
    second = logit_lens(lm, trace, targets=best[:, 1])
    assert (second.ranks[-1] == 1).all()


def test_what_is_not_there_is_refused():
    lm = tiny_language_model()
    with pytest.raises(UserError, match="token 264 is outside the vocabulary of 264"):
        token_attribution(lm, PROMPT, 264)
    with pytest.raises(UserError, match="no method 'integral'"):
        token_attribution(lm, PROMPT, 5, method="integral")
