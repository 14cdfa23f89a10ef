"""The engine: what it writes is what a full forward pass would choose, for every row alone, however it is asked."""

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, byte_level_tokenizer, tiny_checkpoint

from gptjax.checkpoints import formats, pretrained, safetensors
from gptjax.config.errors import UserError
from gptjax.generation import language_model, sampling
from gptjax.generation import loop as decode_loop
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.loop import PromptBatch
from gptjax.generation.requests import SequenceState
from gptjax.generation.sampling import Sampling
from gptjax.generation.weights import weight_shapes
from gptjax.ops import quantized
from gptjax.ops.attention.cache import cached_attention_cpu
from gptjax.ops.attention.mask import Mask
from gptjax.runtime import executables
from gptjax.tokenizer.trained import ByteTokenizer

PROMPTS = [[5, 9, 30], [200, 1, 7, 7, 40, 41, 60, 3, 100], [77], list(range(50, 85))]


def build(family="gpt2", *, tokenizer=None, vocab=264, context=64, layers=1, **options):
    checkpoint = tiny_checkpoint(
        family, vocab=vocab, context=context, layers=layers, tokenizer=tokenizer
    )
    return LanguageModel(checkpoint.config, checkpoint.params, tokenizer, **options)


@pytest.fixture(scope="module")
def lm():
    return build()


@pytest.fixture(scope="module")
def text_lm():
    return build(tokenizer=byte_level_tokenizer())


def greedy(lm, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(lm.logits([ids])[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama3", "mistral", "qwen3"])
def test_greedy_is_the_argmax_of_a_full_forward_pass(family):
    lm = build(family, layers=2)
    for prompt, got in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=6), strict=True):
        assert got.tokens == greedy(lm, prompt, 6)
        assert got.finish_reason == "length"
        logits = lm.logits([[*prompt, *got.tokens]])[0]
        expected = jax.nn.log_softmax(logits)[
            np.arange(len(prompt) - 1, len(prompt) + 5), got.tokens
        ]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


def test_a_request_does_not_depend_on_its_batch_mates(lm):
    settings = dict(max_new_tokens=12, temperature=1.3, top_p=0.95, repetition_penalty=1.1)
    together = lm.generate(PROMPTS, seed=40, **settings)
    for i in (3, 0, 2):
        assert lm.generate([PROMPTS[i]], seed=40 + i, **settings)[0].tokens == together[i].tokens
    assert lm.generate([PROMPTS[0]], seed=41, **settings)[0].tokens != together[0].tokens
    several = lm.generate(PROMPTS[:2], n=3, seed=40, **settings)
    assert len({tuple(c.tokens) for c in several[:3]}) == 3
    assert several[0].tokens == together[0].tokens and several[3].tokens == together[1].tokens


def test_speculation_writes_greedy_text(lm):
    repeated = [*PROMPTS, [1, 2, 3, 4] * 8]
    expected = [c.tokens for c in lm.generate(repeated, max_new_tokens=20)]
    assert [
        c.tokens for c in lm.generate(repeated, max_new_tokens=20, num_speculative_tokens=4)
    ] == expected
    draft = build()
    perfect = lm.generate(repeated, max_new_tokens=20, draft=draft, num_speculative_tokens=3)
    assert [c.tokens for c in perfect] == expected
    other = LanguageModel(
        draft.config, jax.tree.map(lambda p: np.asarray(p) * 1.05, draft.params), None
    )
    found = lm.generate(
        repeated,
        max_new_tokens=20,
        draft=other,
        num_speculative_tokens=2,
        stop_tokens=[expected[0][5]],
    )
    cut = lm.generate(repeated, max_new_tokens=20, stop_tokens=[expected[0][5]])
    assert found[0].finish_reason == "stop"
    for a, b in zip(found, cut, strict=True):
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    with pytest.raises(UserError, match="temperature = 0"):
        lm.generate(PROMPTS, max_new_tokens=4, temperature=1.0, num_speculative_tokens=4)


def test_speculation_needs_fewer_passes():
    """Guesses of a perfect draft are all kept: 4 tokens a pass."""
    lm, count = build(), 3
    from gptjax.generation import speculative

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


def test_beam_search_finds_the_best_sequence(lm):
    """With as many beams as tokens, three steps of beam search are exhaustive enough to check every pair by hand."""
    small = build(vocab=9, context=16)
    found = small.generate([[1, 2]], max_new_tokens=2, num_beams=9, n=3, length_penalty=0.0)
    scores = {}
    for pair in itertools.product(range(9), repeat=2):
        logp = jax.nn.log_softmax(small.logits([[1, 2, *pair]])[0])
        scores[pair] = float(logp[1, pair[0]] + logp[2, pair[1]])
    best = sorted(scores, key=scores.get, reverse=True)[:3]
    assert [tuple(c.tokens) for c in found] == best
    np.testing.assert_allclose([c.score for c in found], [scores[b] for b in best], atol=1e-4)
    np.testing.assert_allclose(
        [sum(c.logprobs) for c in found], [scores[b] for b in best], atol=1e-4
    )
    alone = lm.generate([PROMPTS[1]], max_new_tokens=8, num_beams=3)[0]
    assert lm.generate(PROMPTS, max_new_tokens=8, num_beams=3)[1].tokens == alone.tokens


def test_processors_keep_their_promises(lm):
    ngram = lm.generate(PROMPTS, max_new_tokens=25, no_repeat_ngram=2, temperature=0.3)
    for prompt, c in zip(PROMPTS, ngram, strict=True):
        pairs = list(itertools.pairwise([*prompt, *c.tokens]))
        made = pairs[len(prompt) - 1 :]
        assert len(set(made)) == len(made) and not set(made) & set(pairs[: len(prompt) - 1])
    free = lm.generate(PROMPTS[:1], max_new_tokens=10)[0].tokens
    word = free[2:4]
    banned = lm.generate(PROMPTS[:1], max_new_tokens=10, banned=[word, [free[0]]])[0].tokens
    assert free[0] not in banned and word not in [list(p) for p in itertools.pairwise(banned)]
    assert lm.generate(PROMPTS[:1], max_new_tokens=3, logit_bias={123: 1e4})[0].tokens == [123] * 3
    drawn = dict(max_new_tokens=10, temperature=3.0, seed=7)
    varied = lm.generate(PROMPTS[:1], **drawn)[0].tokens
    at = next(i for i in range(1, 10) if varied[i] not in varied[:i])
    early = lm.generate(PROMPTS[:1], stop_tokens=[varied[at]], **drawn)[0]
    assert (early.tokens, early.finish_reason) == (varied[:at], "stop")
    late = lm.generate(PROMPTS[:1], stop_tokens=[varied[at]], min_new_tokens=9, **drawn)[0]
    assert len(late.tokens) >= 9 and varied[at] not in late.tokens[:9]
    often = lm.generate(PROMPTS[:1], max_new_tokens=30, frequency_penalty=50.0)[0].tokens
    assert len(set(often)) == 30  # each repetition costs more than any logit is worth
    assert lm.generate(PROMPTS[:1], max_new_tokens=10, temperature=5.0, top_k=1)[0].tokens == free


HISTORY = sampling.History(
    tokens=jnp.asarray([[3, 1, 2, 3, 1, 0, 0, 0]]),
    length=jnp.asarray([5]),
    prompt_length=jnp.asarray([2]),
)


def probabilities(logits, **settings):
    request = Sampling(temperature=settings.pop("temperature", 1.0), **settings)
    options = sampling.stack_settings([request], len(logits), [4])
    return jax.nn.softmax(
        sampling.process(jnp.asarray([logits], jnp.float32), options, HISTORY, request.active)
    )[0]


def test_warpers_by_hand():
    """Ties and flat logits included: the kept set and its renormalised probabilities."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = np.log(p)
    check = lambda settings, kept: np.testing.assert_allclose(
        probabilities(logits, **settings),
        np.where(kept, p, 0) / p[np.array(kept) > 0].sum(),
        atol=1e-6,
    )
    check(dict(top_k=2), [1, 1, 0, 0, 0])
    check(dict(top_p=0.69), [1, 1, 0, 0, 0])
    check(dict(top_p=0.71), [1, 1, 1, 0, 0])
    check(dict(min_p=0.3), [1, 1, 1, 0, 0])
    check(dict(top_k=3, top_p=0.5), [1, 1, 0, 0, 0])
    flat = np.zeros(6)
    np.testing.assert_allclose(
        probabilities(flat, top_k=2), np.full(6, 1 / 6), atol=1e-6
    )  # all are equals of the second
    np.testing.assert_allclose(
        probabilities(flat, top_p=0.5), [0, 0, 0, 1 / 3, 1 / 3, 1 / 3], atol=1e-6
    )
    np.testing.assert_allclose(probabilities(flat, min_p=1.0), np.full(6, 1 / 6), atol=1e-6)
    np.testing.assert_allclose(probabilities(flat, typical_p=0.3), np.full(6, 1 / 6), atol=1e-6)
    np.testing.assert_allclose(
        probabilities(logits, temperature=0.5), p**2 / (p**2).sum(), atol=1e-6
    )
    # [3, 1 | 2, 3, 1] came before; 2, 3, 1 were generated
    raw = np.array([1.0, 2.0, -1.0, 0.5, 0.0])
    check = lambda settings, changed: np.testing.assert_allclose(
        probabilities(raw, **settings), jax.nn.softmax(jnp.asarray(changed)), atol=1e-6
    )
    check(dict(repetition_penalty=2.0), [1.0, 1.0, -2.0, 0.25, 0.0])
    check(dict(frequency_penalty=0.5, presence_penalty=0.25), [1.0, 1.25, -1.75, -0.25, 0.0])
    check(dict(no_repeat_ngram=3), [1.0, 2.0, -np.inf, 0.5, 0.0])
    check(dict(min_new_tokens=9), [1.0, 2.0, -1.0, 0.5, -np.inf])
    check(dict(banned=[[1, 3], [9 % 5, 0], [2, 0], [3, 1, 4]]), [1.0, 2.0, -1.0, -np.inf, -np.inf])
    np.testing.assert_allclose(
        probabilities(raw, banned=[[i] for i in range(4)] + [[3, 1, 4]]),
        jax.nn.softmax(jnp.asarray(raw)),
        atol=1e-6,
    )  # nothing left


def test_sampling_follows_the_distribution(lm):
    """Chi-square of 4,000 first tokens against softmax after top-p, with the engine's own keys."""
    prompt, draws, top_p = [5, 9, 30], 4000, 0.6
    exact = probabilities(lm.logits([prompt])[0, -1], top_p=top_p)
    tokens = [
        c.tokens[0]
        for c in lm.generate(
            [prompt], n=draws, max_new_tokens=1, temperature=1.0, top_p=top_p, seed=3
        )
    ]
    counts, wanted = np.bincount(tokens, minlength=264), np.asarray(exact) * draws
    assert (counts[wanted == 0] == 0).all()
    often = wanted >= 5
    statistic = ((counts[often] - wanted[often]) ** 2 / wanted[often]).sum()
    assert statistic < often.sum() + 4 * np.sqrt(2 * often.sum())


def test_settings_out_of_range_are_refused(lm):
    for settings, part in (
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(min_p=2.0), "min_p"),
        (dict(seed=-1), "seed"),
        (dict(temprature=1.0), "did you mean 'temperature'"),
        (dict(logit_bias={9999: 1.0}), "outside the vocabulary"),
        (dict(banned=["word"]), "tokenizer"),
        (dict(stop="x"), "tokenizer"),
        (dict(n=0), "at least 1"),
        (dict(max_new_tokens=0), "at least 1"),
        (dict(overflow="cut"), "overflow policy"),
        (dict(num_speculative_tokens=-1), "num_speculative_tokens"),
        (dict(stop_tokens=[2**40]), "outside the vocabulary"),
        (dict(top_k=0.5), "top_k"),
        (dict(logit_bias={"5": 1.0}), "outside the vocabulary"),
        (dict(num_beams=2, temperature=1.0), "num_beams"),
        (dict(num_beams=2, early_stopping="maybe"), "early_stopping"),
        (dict(max_new_tokens=63), "ask for at most 62"),
    ):
        with pytest.raises(UserError, match=part):
            lm.generate([[1, 2, 3]], **{"max_new_tokens": 4, **settings})
    for prompts, part in (
        ([], "no prompts"),
        ([[999]], "outside the vocabulary"),
        (["text"], "no tokenizer"),
        ([[]], "empty prompt"),
        ([[1] * 65], "shorten it"),
    ):
        with pytest.raises(UserError, match=part):
            lm.generate(prompts, max_new_tokens=4)
    with pytest.raises(UserError, match="must be"):
        lm.logits([[1] * 65])
    with pytest.raises(UserError, match="did you mean 'int8'"):
        build(weights="int9")


def test_stop_text_is_found_across_tokens(text_lm):
    free = text_lm.generate("the cat", max_new_tokens=40, temperature=1.5, seed=1)
    data = text_lm.tokenizer.decode_bytes(free.tokens).decode(errors="replace")
    assert free.text == data
    stop = data[9:13]
    cut = text_lm.generate(
        "the cat", max_new_tokens=40, temperature=1.5, seed=1, stop=[stop, "never there"]
    )
    assert (cut.text, cut.finish_reason) == (data[: data.find(stop)], "stop")
    pieces = list(
        text_lm.stream("the cat", max_new_tokens=40, temperature=1.5, seed=1, stop=[stop])
    )
    assert "".join(pieces) == cut.text
    assert (
        "".join(text_lm.stream("the cat", max_new_tokens=40, temperature=1.5, seed=1)) == free.text
    )
    assert len(list(text_lm.stream("the cat", max_new_tokens=40, temperature=1.5, seed=1))) > 3


def test_a_row_never_shows_half_a_character_or_half_a_stop():
    row = SequenceState(ByteTokenizer(), ["END"], [256])
    shown = ""
    for byte in "é€ EN ENDx".encode():
        row.feed(byte, 0.0)
        shown += row.text[len(shown) : row.safe]
        assert "\ufffd" not in shown and not shown.endswith(("E", "EN"))
    row.finish("length")
    assert row.text == "é€ EN " and row.reason == "stop"
    assert shown + row.text[len(shown) : row.safe] == row.text


def test_text_slides_past_the_context():
    lm = build(context=32)
    with pytest.raises(UserError, match="overflow='slide'"):
        lm.generate(PROMPTS, max_new_tokens=100)
    found = lm.generate(PROMPTS, max_new_tokens=100, overflow="slide")
    assert [len(c.tokens) for c in found] == [100] * 4
    assert found[0].tokens[:29] == lm.generate(PROMPTS[:1], max_new_tokens=29)[0].tokens
    assert (
        lm.generate([PROMPTS[2]], max_new_tokens=100, overflow="slide")[0].tokens == found[2].tokens
    )
    window = [*PROMPTS[2], *found[2].tokens][: 32 + 1][
        -16:
    ]  # the context is full: its latest half is read again
    assert found[2].tokens[32:36] == greedy(lm, window, 4)


def test_scores_and_prompt_logprobs(text_lm):
    pairs = [("the cat", " in the hat"), ("a ", "b"), ("", "the"), ("x" * 30, "y")]
    scores = text_lm.score([p for p, _ in pairs], [c for _, c in pairs])
    for (prompt, completion), (logprob, flag) in zip(pairs, scores, strict=True):
        first = text_lm.encode(prompt.rstrip())
        whole = (
            text_lm.encode(prompt + completion)
            if prompt
            else [*first, *text_lm.tokenizer.encode(completion)]
        )
        logp = np.asarray(jax.nn.log_softmax(text_lm.logits([whole])[0]))
        at = np.arange(len(first) - 1, len(whole) - 1)
        assert logprob == pytest.approx(logp[at, whole[len(first) :]].sum(), abs=1e-3)
        assert flag == (logp[at].argmax(-1) == whole[len(first) :]).all()
    made = text_lm.generate("the cat", max_new_tokens=3)
    assert text_lm.score([text_lm.encode("the cat")], [made.tokens])[0][1] == (
        made.finish_reason == "length"
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
    found = lm.logits(tokens, [4, 10])
    assert (found[0, 4:] == 0).all() and (found[1] != 0).any(-1).all()
    np.testing.assert_array_equal(found[0, :4], lm.logits(tokens)[0, :4])


def test_the_last_slot_of_the_context_counts(lm):
    """Beams and scores may end one token past the last that is read."""
    prompt = [1] * 10
    beams = lm.generate([prompt], max_new_tokens=55, num_beams=2)[0]
    assert len(beams.tokens) == 55 == len(beams.logprobs)
    assert lm.score([prompt], [beams.tokens])[0][0] == pytest.approx(sum(beams.logprobs), abs=1e-3)
    assert lm.score([prompt], [[]]) == [(0.0, True)]


def test_penalties_and_least_lengths_outlive_a_slide():
    lm = build(context=32)
    sliding = dict(max_new_tokens=60, overflow="slide", stop_tokens=[7], logit_bias={7: 1e4})
    assert len(lm.generate([[1] * 20], min_new_tokens=30, **sliding)[0].tokens) == 30
    often = lm.generate([[1] * 20], max_new_tokens=28, overflow="slide", presence_penalty=1e5)[
        0
    ].tokens
    assert len(set(often[12:])) == 16  # of those still in sight


def test_a_model_may_know_more_tokens_than_its_tokenizer():
    lm = build(vocab=300, tokenizer=byte_level_tokenizer())
    for beams in (1, 2):
        found = lm.generate("ab", max_new_tokens=4, num_beams=beams, logit_bias={290: 50.0})
        assert found.tokens == [290] * 4 and found.text == ""


def test_a_prefix_is_written_once():
    """Completions have no start token of their own."""
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_ids = (261,)
    lm = build(tokenizer=tokenizer)
    ids = tokenizer.encode("the cat")
    assert lm.score([""], ["the cat"]) == lm.score([[261]], [ids])
    assert lm.score([[261, *ids[:1]]], [tokenizer.decode(ids[1:])]) == lm.score(
        [[261, *ids[:1]]], [ids[1:]]
    )


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_smaller_weights_stay_close(weights, lm):
    small = build(weights=weights)
    tokens = np.random.default_rng(0).integers(0, 264, (2, 30))
    exact = lm.logits(tokens)
    gap = np.abs(small.logits(tokens) - exact).max() / np.abs(exact).max()
    assert 0 < gap < (0.02 if weights == "bfloat16" else 0.05)
    stored = {
        leaf.dtype.name
        for block in small._weights["blocks"]
        for leaf in [block["mlp"]["up"]["rows"], block["attn"]["qkv"]["rows"]]
    }
    assert stored == {weights}
    assert len(small.generate([[1, 2, 3]], max_new_tokens=5)[0].tokens) == 5


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("count", "width"), [(1, 768), (1, 576), (1, 16), (1, 40), (3, 48), (8, 7), (9, 48), (70, 48)]
)
@pytest.mark.parametrize("features", [1, 5, 24])
def test_a_product_rounds_weights_and_not_activations(weights, count, width, features):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((count, width)).astype(np.float32)
    kept = quantized.quantize_rows(
        jnp.asarray(rng.standard_normal((features, width)), jnp.float32), weights
    )
    exact = x.astype(np.float64) @ np.asarray(quantized.dequantize(kept), np.float64).T
    for product in (
        quantized.matmul_cpu,
        jax.jit(quantized.matmul_cpu),
        executables.jit(quantized.matmul_cpu),
    ):
        np.testing.assert_allclose(
            product(jnp.asarray(x), kept), exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max()
        )


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_one_row_is_multiplied_as_it_is_among_others(weights):
    """or a near tie turns on how many rows are fed at once, and speculation writes another text than greedy"""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 768)), jnp.float32)
    kept = quantized.quantize_rows(
        jnp.asarray(rng.standard_normal((24, 768)), jnp.float32), weights
    )
    product = executables.jit(quantized.matmul_cpu)
    for count in (2, 5, 8):
        np.testing.assert_allclose(
            product(x[:1], kept)[0], product(x[:count], kept)[0], rtol=0, atol=5e-5
        )  # of 100: sums in another order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_query_reads_a_cache_as_the_definition_does(dtype, groups):
    rng = np.random.default_rng(0)
    batch, heads, width, slots, last = 2, 3, 64, 96, np.array([[5], [95]], np.int32)
    q = rng.standard_normal((batch, 1, heads, groups, width)).astype(np.float32)
    k, v = rng.standard_normal((2, batch * heads, slots, width)).astype(np.float32) * (
        40 if dtype == "int8" else 1
    )
    cache = {
        "k": jnp.asarray(k.round() if dtype == "int8" else k).astype(dtype),
        "v": jnp.asarray(v.round() if dtype == "int8" else v).astype(dtype).swapaxes(1, 2),
    }
    if dtype == "int8":
        cache |= {
            name: jnp.asarray(rng.uniform(0.01, 0.04, (batch * heads, slots)), jnp.float32)
            for name in ("k_scale", "v_scale")
        }
    meant = {n: np.asarray(cache[n], np.float64) for n in ("k", "v")}
    meant["k"] *= np.asarray(cache.get("k_scale", np.ones((batch * heads, slots))))[:, :, None]
    meant["v"] *= np.asarray(cache.get("v_scale", np.ones((batch * heads, slots))))[:, None]
    k, v = (
        meant["k"].reshape(batch, heads, slots, width),
        meant["v"].reshape(batch, heads, width, slots),
    )
    scores = np.einsum("BKGC,BKSC->BKGS", q[:, 0], k) / 8
    scores = np.where(np.arange(slots) <= last[:, :, None, None], scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("BKGS,BKCS->BKGC", probs / probs.sum(-1, keepdims=True), v)[:, None]
    np.testing.assert_allclose(
        jax.jit(cached_attention_cpu)(q, cache, Mask(last)), exact, atol=1e-5
    )


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_smaller_caches_stay_close(cache_dtype, lm):
    small = build(cache_dtype=cache_dtype)
    prompt = PROMPTS[3]
    tokens = np.zeros((1, decode_loop.bucket(36, 64, 32)), np.int32)
    tokens[0, :35] = prompt
    found = {}
    for one in (lm, small):
        cache = decode_loop.prefill(
            one._inference_config,
            one._weights,
            tokens,
            np.array([35], np.int32),
            cache_dtype=one.cache_dtype,
        )
        x, _ = decode_loop.feed(
            one._inference_config, one._weights, jnp.asarray(tokens), jnp.asarray([35]), cache
        )
        found[one.cache_dtype] = np.asarray(x)
        assert cache[0]["k"].dtype == (cache_dtype if one is small else "float32")
    gap = np.abs(found[cache_dtype] - found[""]).max() / np.abs(found[""]).max()
    assert 0 < gap < 0.03


def test_a_hundred_prompt_lengths_take_six_programs():
    lm = build("llama", context=256)
    programs = lambda: (
        decode_loop.prefill.compiled()._cache_size() + decode_loop.advance.compiled()._cache_size()
    )
    before = programs()
    for n in range(1, 101):
        lm.generate([list(range(n))], max_new_tokens=2)
    assert programs() - before <= 6


@pytest.fixture
def stored(tmp_path):
    formats.write_checkpoint(
        tmp_path / "hf", tiny_checkpoint("llama", context=256, tokenizer=byte_level_tokenizer())
    )
    return tmp_path / "hf"


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_stored_weights_are_read_a_layer_at_a_time_as_they_are_at_once(stored, weights):
    whole = pretrained.read_checkpoint(stored)
    at_once, by_layer = (
        LanguageModel(whole.config, whole.params, None, weights=weights),
        language_model.load(stored, weights=weights),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, at_once._weights, by_layer._weights))
    assert jax.tree.map(
        lambda a: (a.shape, a.dtype), weight_shapes(by_layer.config, weights)
    ) == jax.tree.map(lambda a: (a.shape, a.dtype), by_layer._weights)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, by_layer.params))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.8, top_k=5),
        dict(n=2, repetition_penalty=1.1),
        dict(stop="a", banned=["b"]),
    ],
)
def test_programs_are_made_while_weights_are_read(stored, options):
    made, listen = (
        [],
        lambda event, seconds, fun_name="", **_: made.append(fun_name) if "mlir" in event else None,
    )
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with language_model.load_lazily(stored) as lm:
            lm.compile("the cat", max_new_tokens=20, **options)
        assert {"jit(prefill)", "jit(advance)"} <= set(made)
        made.clear()
        found = lm.generate(["the cat"], max_new_tokens=20, **options)
        assert not {"jit(prefill)", "jit(advance)"} & set(made)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert found == language_model.load(stored).generate(["the cat"], max_new_tokens=20, **options)


def test_a_look_at_the_parameters_disturbs_no_reading(stored, monkeypatch):
    part = safetensors.LazyParams.part
    monkeypatch.setattr(
        safetensors.LazyParams, "part", lambda self, layer: (time.sleep(0.2), part(self, layer))[1]
    )
    with language_model.load_lazily(stored) as lm:
        looked = lm.params
    assert lm.params is looked and lm.source.params is looked
    assert lm.generate([[5, 9]], max_new_tokens=3) == language_model.load(stored).generate(
        [[5, 9]], max_new_tokens=3
    )


def test_a_fault_ends_the_reading(stored, monkeypatch):
    read = []
    monkeypatch.setattr(
        safetensors.LazyParams,
        "part",
        lambda self, layer, part=safetensors.LazyParams.part: (
            time.sleep(0.2),
            part(self, layer),
            read.append(layer),
        )[1],
    )
    with pytest.raises(UserError, match="context"), language_model.load_lazily(stored) as lm:
        lm.compile("the cat " * 100)
    assert len(read) < 3
    with pytest.raises(UserError, match="ended before all was read"):
        _ = lm.params


def test_buckets_hold_what_they_must():
    for context in (17, 64, 1024, 8192):
        sizes = {decode_loop.bucket(n, context, 32) for n in range(1, context + 1)}
        assert len(sizes) <= 4
        assert all(decode_loop.bucket(n, context, 32) >= n for n in range(1, context + 1))
        assert all(size % 32 == 0 for size in sizes)


def test_every_row_stops_by_itself(lm):
    free = lm.generate(PROMPTS, max_new_tokens=20)
    stop = free[1].tokens[4]
    for alone, c in zip(
        free, lm.generate(PROMPTS, max_new_tokens=20, stop_tokens=[stop]), strict=True
    ):
        at = alone.tokens.index(stop) if stop in alone.tokens else 20
        assert c.tokens == alone.tokens[:at]
        assert c.finish_reason == ("stop" if at < 20 else "length")
    assert dataclasses.asdict(free[0])["prompt_logprobs"] is None


GOLDEN = json.loads((ROOT / "tests" / "golden" / "generation.json").read_text())
NAMES = {"no_repeat_ngram_size": "no_repeat_ngram", "eos_token_id": "stop_tokens"}


@pytest.mark.parametrize("family", GOLDEN["families"])
def test_golden_numbers_of_transformers(family):
    """Made by tests/golden/make.py; the parity tests compare with the library itself."""
    lm, golden = build(family, layers=2), GOLDEN["families"][family]
    np.testing.assert_allclose(
        lm.logits([GOLDEN["prompts"][1]])[0, -1, :32], golden["logits"], atol=1e-4
    )
    for name, settings in GOLDEN["settings"].items():
        ours = {NAMES.get(key, key): value for key, value in settings.items()}
        for expected, got in zip(
            golden[name], lm.generate(GOLDEN["prompts"], max_new_tokens=12, **ours), strict=True
        ):
            assert got.tokens == (
                expected[:-1] if expected[-1] in settings.get("eos_token_id", []) else expected
            ), name
