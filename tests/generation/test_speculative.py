"""Speculation writes the text of greedy decoding, in fewer passes."""

import jax
import numpy as np
import pytest
from helpers import PROMPTS, tiny_language_model

from gptjax.config.errors import UserError
from gptjax.generation import loop as decode_loop
from gptjax.generation import sampling, speculative
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.loop import PromptBatch
from gptjax.generation.sampling import Sampling


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model()


def test_speculation_writes_greedy_text(lm):
    repeated = [*PROMPTS, [1, 2, 3, 4] * 8]
    expected = [c.tokens for c in lm.generate(repeated, max_new_tokens=20)]
    assert [
        c.tokens for c in lm.generate(repeated, max_new_tokens=20, num_speculative_tokens=4)
    ] == expected
    draft = tiny_language_model()
    perfect = lm.generate(repeated, max_new_tokens=20, draft=draft, num_speculative_tokens=3)
    assert [c.tokens for c in perfect] == expected
    other = LanguageModel(
        draft.config, jax.tree.map(lambda p: np.asarray(p) * 1.05, draft.params), None
    )
    speculated = lm.generate(
        repeated,
        max_new_tokens=20,
        draft=other,
        num_speculative_tokens=2,
        stop_tokens=[expected[0][5]],
    )
    cut = lm.generate(repeated, max_new_tokens=20, stop_tokens=[expected[0][5]])
    assert speculated[0].finish_reason == "stop"
    for a, b in zip(speculated, cut, strict=True):
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    with pytest.raises(UserError, match="temperature = 0"):
        lm.generate(PROMPTS, max_new_tokens=4, temperature=1.0, num_speculative_tokens=4)


def test_speculation_needs_fewer_passes():
    """Guesses of a perfect draft are all right: 4 tokens a pass."""
    lm, count = tiny_language_model(), 3
    batch = PromptBatch([[5, 9, 30]], limits=[23], seeds=[0], slots=decode_loop.bucket(40, 64, 32))
    speculation = speculative.Speculation(count, draft=lm._model)
    state = speculative.advance(
        lm._inference_config,
        lm._weights,
        speculative.begin(decode_loop.start(lm._model, batch), speculation),
        sampling.stack_settings([Sampling()], 264, []),
        np.int32(99),
        active=frozenset(),
        count=count,
        draft_config=lm._inference_config,
        draft_params=lm._weights,
    )
    assert state.length.tolist() == [23]
    assert int(state.passes) == 20 // (count + 1)
