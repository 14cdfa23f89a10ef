"""Log-probabilities and logits of given texts."""

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer
from helpers import tiny_language_model


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model()


@pytest.fixture(scope="module")
def text_lm():
    return tiny_language_model(tokenizer=byte_level_tokenizer())


def test_scores_and_prompt_logprobs(text_lm):
    pairs = [("the cat", " in the hat"), ("a ", "b"), ("", "the"), ("x" * 30, "y")]
    scores = text_lm.score([p for p, _ in pairs], [c for _, c in pairs])
    for (prompt, completion), (logprob, flag) in zip(pairs, scores, strict=True):
        first = text_lm.encode(prompt.rstrip())
        ids = (
            text_lm.encode(prompt + completion)
            if prompt
            else [*first, *text_lm.tokenizer.encode(completion)]
        )
        logp = np.asarray(jax.nn.log_softmax(text_lm.logits([ids])[0]))
        at = np.arange(len(first) - 1, len(ids) - 1)
        assert logprob == pytest.approx(logp[at, ids[len(first) :]].sum(), abs=1e-3)
        assert flag == (logp[at].argmax(-1) == ids[len(first) :]).all()
    completion = text_lm.generate("the cat", max_new_tokens=3)
    assert text_lm.score([text_lm.encode("the cat")], [completion.tokens])[0][1] == (
        completion.finish_reason == "length"
    )
    again = text_lm.generate(["the cat"], max_new_tokens=3, prompt_logprobs=True)[0]
    ids = text_lm.encode("the cat")
    assert len(again.prompt_logprobs) == len(ids) - 1
    np.testing.assert_allclose(
        again.prompt_logprobs,
        np.asarray(jax.nn.log_softmax(text_lm.logits([ids])[0]))[np.arange(len(ids) - 1), ids[1:]],
        atol=1e-4,
    )


def test_logits_stop_at_each_length(lm):
    tokens = np.arange(20).reshape(2, 10)
    logits = lm.logits(tokens, [4, 10])
    assert (logits[0, 4:] == 0).all() and (logits[1] != 0).any(-1).all()
    np.testing.assert_array_equal(logits[0, :4], lm.logits(tokens)[0, :4])


def test_a_prefix_is_written_once():
    """Completions have no start token of their own."""
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_ids = (261,)
    lm = tiny_language_model(tokenizer=tokenizer)
    ids = tokenizer.encode("the cat")
    assert lm.score([""], ["the cat"]) == lm.score([[261]], [ids])
    assert lm.score([[261, *ids[:1]]], [tokenizer.decode(ids[1:])]) == lm.score(
        [[261, *ids[:1]]], [ids[1:]]
    )
