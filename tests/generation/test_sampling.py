"""Processors of logits, by hand and in generated text; settings out of range."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROMPTS, tiny_language_model
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config.errors import UserError
from gptjax.generation import sampling
from gptjax.generation.sampling import Sampling
from gptjax.runtime import executables


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model()


def test_processors_keep_their_promises(lm):
    ngram = lm.generate(PROMPTS, max_new_tokens=25, no_repeat_ngram=2, temperature=0.3)
    for prompt, c in zip(PROMPTS, ngram, strict=True):
        pairs = list(itertools.pairwise([*prompt, *c.tokens]))
        new_pairs = pairs[len(prompt) - 1 :]
        assert len(set(new_pairs)) == len(new_pairs) and not set(new_pairs) & set(
            pairs[: len(prompt) - 1]
        )
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
    """Ties and flat logits included: the set that stays and its renormalised probabilities."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = np.log(p)
    check = lambda settings, stays: np.testing.assert_allclose(
        probabilities(logits, **settings),
        np.where(stays, p, 0) / p[np.array(stays) > 0].sum(),
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


@pytest.mark.parametrize(("low", "high"), [(10, 0), (50, 0), (130, 0), (1000, 0), (500, 250)])
def test_of_equals_as_many_stay_as_top_p_says(low, high):
    """However sums round. Among the low ones are some that are twice as likely."""
    per_mille = [*range(100, 1000, 100), 298, 426, 990, 998, 999]
    requests = [Sampling(temperature=1.0, top_p=number / 1000) for number in per_mille]
    logits = np.concatenate([np.zeros(low), np.full(high, np.log(2))]).astype(np.float32)
    batch = jnp.asarray(np.tile(logits, (len(requests), 1)))
    settings = sampling.stack_settings(requests, low + high, [4])
    rows = sampling.process(batch, settings, HISTORY, requests[0].active) > -np.inf
    for number, kept in zip(per_mille, np.asarray(rows), strict=True):
        likely = -(-number * (low + 2 * high) // 1000)  # in units of an unlikely one
        assert kept[low:].sum() == min(-(-likely // 2), high), number
        assert kept[:low].sum() == max(likely - 2 * high, 0), number
        for equals in (kept[:low], kept[low:]):
            assert (np.diff(equals.astype(int)) >= 0).all()  # the larger ids


def stays(logits, top_k=0, top_p=1.0, typical_p=1.0):
    """bool [V]: what one warper keeps, as it is defined: by sorting."""
    x = np.asarray(logits, np.float64)
    probs = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if top_k:
        return x >= np.sort(x)[-min(top_k, len(x))]
    kept = np.ones(len(x), bool)
    if top_p < 1:  # the least likely first, of equals those with the smaller id
        order = np.argsort(x, kind="stable")
        removed = np.cumsum(probs[order]) <= 1 - top_p
        kept[order[:-1]] = ~removed[:-1]
        return kept
    surprise = -np.log(probs)
    distance = np.abs(surprise - (probs * surprise).sum())
    order = np.argsort(distance, kind="stable")
    last = min((np.cumsum(probs[order]) < typical_p).sum(), len(x) - 1)
    return distance <= distance[order[last]] + 1e-6


WARPED = st.one_of(
    st.fixed_dictionaries({"top_k": st.integers(1, 20)}),
    st.fixed_dictionaries({"top_p": st.floats(0.001, 0.999)}),
    st.fixed_dictionaries({"typical_p": st.floats(0.001, 0.999)}),
)


@hypothesis.settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(
        st.sampled_from([-9.0, -2.5, -0.3, 0.0, 0.4, 1.7, 1.75, 5.0]), min_size=12, max_size=12
    ),
    asked=WARPED,
)
def test_warpers_keep_what_sorting_keeps(logits, asked):
    """Equals included; what is within a rounding of the limit may be in or out."""
    got = np.asarray(probabilities(logits, **asked)) > 0
    near = [{name: value * (1 + e) for name, value in asked.items()} for e in (-1e-5, 1e-5)]
    allowed = [stays(logits, **asked)]
    if "top_k" not in asked:
        allowed += [stays(logits, **some) for some in near]
    assert any((got == kept).all() for kept in allowed)


@pytest.mark.parametrize("asked", [dict(top_k=40), dict(top_p=0.9), dict(min_p=0.02)])
@pytest.mark.parametrize("asked_too", [dict(typical_p=0.8), dict(top_p=0.7, top_k=90)])
@pytest.mark.parametrize("vocab_size", [257, 5000])
def test_in_order_a_rows_bits_do_not_depend_on_other_rows(asked, asked_too, vocab_size):
    """Neither on their number nor on what they ask for."""
    options = executables._CPU_OPTIONS | {"xla_backend_optimization_level": 3}
    logits = np.random.default_rng(0).standard_normal((16, vocab_size)).astype(np.float32)
    requests = [Sampling(temperature=0.9, **(asked if i % 2 else asked_too)) for i in range(16)]

    def run(rows):
        some = requests[rows]
        active = sampling.active_processors(some)
        process = lambda *args: sampling.process(*args, active, in_order=True)
        history = sampling.History(np.zeros((len(some), 4), np.int32), *np.ones((2, len(some))))
        asked = sampling.stack_settings(some, vocab_size, [1])
        return np.asarray(jax.jit(process, compiler_options=options)(logits[rows], asked, history))

    together = run(slice(0, 16))
    for i in (0, 1, 6, 15):
        np.testing.assert_array_equal(run(slice(i, i + 1))[0], together[i])
    np.testing.assert_array_equal(run(slice(0, 8)), together[:8])
    kept_tokens = np.isfinite(together).sum(-1)
    assert (kept_tokens > 0).all() and (kept_tokens < vocab_size).all()


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
    counts, expected = np.bincount(tokens, minlength=264), np.asarray(exact) * draws
    assert (counts[expected == 0] == 0).all()
    often = expected >= 5
    statistic = ((counts[often] - expected[often]) ** 2 / expected[often]).sum()
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
        tiny_language_model(weights="int9")


def test_in_order_what_others_ask_for_changes_no_bit():
    """Penalties are not added up in one with the processors that only others need."""
    random, options = np.random.default_rng(0), executables._CPU_OPTIONS
    options = options | {"xla_backend_optimization_level": 3}
    asked = sampling.Sampling(frequency_penalty=0.37, presence_penalty=0.53)
    others = sampling.Sampling(logit_bias={3: 1.3}, repetition_penalty=1.3, temperature=0.7)
    settings = sampling.stack_settings([asked], 264, [1])
    settings["logit_bias"] = np.zeros((1, 264), np.float32)
    tokens = random.integers(0, 50, (1, 60)).astype(np.int32)
    history = sampling.History(tokens, np.array([60]), np.array([15]))
    logits = (3 * random.standard_normal((1, 264))).astype(np.float32)

    def run(active):
        process = lambda *args: sampling.process(*args, active, in_order=True)
        compiled = jax.jit(process, compiler_options=options)
        return np.asarray(compiled(logits, settings, history))

    np.testing.assert_array_equal(run(asked.active), run(asked.active | others.active))
