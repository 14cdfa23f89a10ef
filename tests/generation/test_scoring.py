"""Log-probabilities and logits of given texts."""

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, pieces_json
from helpers import tiny_language_model

from gptjax.checkpoints.gguf_vocabulary import CONTROL, NORMAL, UNKNOWN
from gptjax.config.errors import UserError
from gptjax.generation import pairs
from gptjax.generation.pairs import Pair
from gptjax.tokenizer.pretrained import PretrainedTokenizer


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


def logprob(lm, context, *ids):
    """log P(ids | context), one full pass."""
    logp = np.asarray(jax.nn.log_softmax(lm.logits([[*context, *ids]])[0]))
    return sum(float(logp[len(context) - 1 + k, i]) for k, i in enumerate(ids))


def test_a_token_that_spans_the_border(text_lm):
    """The chance of the completion's characters given those of the prompt, written out by hand."""
    ids = text_lm.tokenizer.encode
    x, space, th, the, _the = (
        ids("x th")[0],
        ids(" ")[0],
        ids("th")[0],
        ids("the")[0],
        ids(" the")[0],
    )
    prefix = np.logaddexp.reduce(  # " th" may be written in three ways
        [
            logprob(text_lm, [x], _the),
            logprob(text_lm, [x], space, th),
            logprob(text_lm, [x], space, the),
        ]
    )
    assert text_lm.encode("x th") == [x, space, th] and text_lm.encode("x the") == [x, _the]
    candidates = ["e", "a", "e in", "e\n"]
    scores = [score for score, _ in text_lm.score(["x th"] * 4, candidates)]
    assert scores[0] == pytest.approx(logprob(text_lm, [x], _the) - prefix, abs=1e-3)
    assert scores[1] == pytest.approx(logprob(text_lm, [x, space, th], ids("a")[0]), abs=1e-3)
    end = logprob(text_lm, [x, _the], *ids(" in"))
    assert scores[2] == pytest.approx(scores[0] + end, abs=1e-3)
    assert max(scores) < 0
    # greedy decoding takes the likeliest of the ways
    best = np.argmax([logprob(text_lm, [x], _the), logprob(text_lm, [x], space, the), -50])
    assert text_lm.score(["x th"], ["e"])[0][1] == (best == 0)


def test_a_pair_whose_first_token_does_not_cover_what_it_replaces(text_lm):
    ids = text_lm.tokenizer.encode
    x, t, h, e = (ids(c)[0] for c in "xthe")
    th, the, in_ = ids("th")[0], ids("the")[0], ids("in")[0]
    begin_with_e = [i for i, text in enumerate(text_lm.tokenizer.token_bytes) if text[:1] == b"e"]
    ways = [logprob(text_lm, [x], the), logprob(text_lm, [x], t, h, e)]
    ways += [logprob(text_lm, [x], th, i) for i in begin_with_e]
    pair = Pair([x], [t, h, e, in_], [th, e])
    expected = logprob(text_lm, [x], t, h, e, in_) - np.logaddexp.reduce(ways)
    assert text_lm.score_pairs([pair])[0][0] == pytest.approx(expected, abs=1e-3)
    assert text_lm.score_pairs([pair._replace(completion=[the])])[0][0] == pytest.approx(
        ways[0] - np.logaddexp.reduce([ways[0], *ways[2:]]), abs=1e-3
    )


def test_scores_of_a_text_are_below_zero_and_do_not_depend_on_the_batch(text_lm):
    texts = [
        ("t", "he"),  # the prompt is no token of the text at all
        ("x th", "e"),
        ("x t", "he i"),
        ("", "th"),
        ("x ", "the"),
        ("x", " "),
        ("x  ", " the"),
        ("x <|im_", "end|>"),
        ("<|im_end|", ">the"),
        ("\U0001f469", "\u200d\U0001f4bb"),
        ("e", "\u0301"),
        ("\u6f22 t", "h\u5b57"),
    ]
    prompts, completions = zip(*texts, strict=True)
    scores = text_lm.score(prompts, completions)
    for score, _ in scores:
        assert np.isfinite(score) and score < 0
    for k in (0, 2):
        alone = text_lm.score([prompts[k]], [completions[k]])[0]
        assert alone == (pytest.approx(scores[k][0], abs=1e-4), scores[k][1])


def test_nothing_is_certain_and_a_completion_that_the_tokenizer_loses_is_refused(text_lm, lm):
    assert text_lm.score(["the cat", "x "], ["", ""]) == [(0.0, True)] * 2
    assert lm.score([[1, 2]], [[]]) == [(0.0, True)]
    with pytest.raises(UserError, match="the tokenizer writes nothing"):
        pairs.align([1, 2], [1, 2], start=0)


def test_the_border_may_lie_at_the_end_of_the_context(text_lm):
    context = text_lm.config.context
    ids = text_lm.tokenizer.encode
    fits = Pair([1] * (context - 1), ids(" the"), ids(" th"))
    assert text_lm.score_pairs([fits])[0][0] < 0
    with pytest.raises(UserError, match="shorten the prompt"):
        text_lm.score_pairs([fits._replace(context=[1] * context)])


def test_ids_go_on_without_a_space_that_the_text_does_not_have():
    letters = ["\u2581", "i", "s", "a", "\n", "is", "\u2581is"]
    pieces = ["<unk>", "<s>", "</s>", *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * len(letters)]
    content = pieces_json(pieces, [-float(i) for i in range(len(pieces))], kinds, bos=1)
    tokenizer = PretrainedTokenizer({"tokenizer.json": content}, [2])
    assert tokenizer.leading_space
    assert tokenizer.decode_bytes(tokenizer.encode("is")) == b" is"
    for text in ("is", " is", "s a"):
        assert tokenizer.decode_bytes(pairs.encode_inside(tokenizer, text)) == text.encode()
