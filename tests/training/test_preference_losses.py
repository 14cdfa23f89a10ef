"""Each loss against its published formula in float64, symmetries, gradients of extreme numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.training import preference_losses

sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def sums(count, seed=0):
    """`count` arrays [13] of log-probabilities of answers of some ten tokens; four are round."""
    logprobs = -30 * np.random.default_rng(seed).random((count, 13))
    logprobs[:, :4] = -np.arange(1.0, count + 1)[:, None] * [1, 2, 3, 4]
    return logprobs.astype(np.float32).astype(np.float64)


def close(actual, expected):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_is_its_formula(beta, smoothing):
    a, b, ra, rb = sums(4)
    loss, diagnostics = preference_losses.dpo(
        a, b, reference_chosen=ra, reference_rejected=rb, beta=beta, label_smoothing=smoothing
    )
    h = beta * (a - ra) - beta * (b - rb)
    close(loss, -(1 - smoothing) * np.log(sigmoid(h)) - smoothing * np.log(sigmoid(-h)))
    close(diagnostics["reward_chosen"], beta * (a - ra))
    close(diagnostics["reward_rejected"], beta * (b - rb))
    close(diagnostics["reward_margin"], h)
    close(diagnostics["accuracy"], h > 0)
    assert 0 < diagnostics["accuracy"].mean() < 1


def test_dpo_before_training_is_log_2():
    a, b = sums(2)
    loss, diagnostics = preference_losses.dpo(a, b, reference_chosen=a, reference_rejected=b)
    close(loss, np.full(13, np.log(2)))
    assert not diagnostics["accuracy"].any()


def test_swapped_answers_mirror_each_other():
    a, b, ra, rb = sums(4)
    loss, diagnostics = preference_losses.dpo(
        a, b, reference_chosen=ra, reference_rejected=rb, beta=0.3
    )
    other, mirrored = preference_losses.dpo(
        b, a, reference_chosen=rb, reference_rejected=ra, beta=0.3
    )
    close(mirrored["reward_margin"], -diagnostics["reward_margin"])
    close(mirrored["accuracy"][4:], 1 - diagnostics["accuracy"][4:])  # the round numbers before tie
    close(other - loss, diagnostics["reward_margin"])  # log(sigma(h) / sigma(-h)) = h
    certain = preference_losses.dpo(
        a, b, reference_chosen=ra, reference_rejected=rb, label_smoothing=0.5, beta=0.3
    )[0]
    close(certain, (loss + other) / 2)
    short = lambda a, b: preference_losses.orpo(a / 30, b / 30, nll=np.zeros(13), weight=1.0)
    close(short(a, b)[1]["log_odds_ratio"], -short(b, a)[1]["log_odds_ratio"])


def test_ipo_is_its_formula():
    a, b, ra, rb = sums(4)
    loss, diagnostics = preference_losses.ipo(
        a, b, reference_chosen=ra, reference_rejected=rb, beta=0.25
    )
    close(loss, (np.log(np.exp(a) * np.exp(rb) / (np.exp(b) * np.exp(ra))) - 1 / (2 * 0.25)) ** 2)
    close(diagnostics["reward_chosen"], 0.25 * (a - ra))


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_orpo_is_its_formula(weight):
    a, b, nll = (-x / 10 for x in sums(3))
    loss, diagnostics = preference_losses.orpo(-a, -b, nll=nll, weight=weight)
    odds = lambda logp: np.exp(logp) / -np.expm1(logp)
    ratio = odds(-a) / odds(-b)
    close(loss, nll - weight * np.log(sigmoid(np.log(ratio))))
    close(diagnostics["log_odds_ratio"], np.log(ratio))
    close(diagnostics["accuracy"], a < b)
    close(diagnostics["reward_rejected"], -weight * b)


def test_odds_keep_their_digits_at_both_ends():
    logp = -np.asarray([2e-6, 1e-4, 0.01, 0.5, 0.6931, 0.6932, 2.0, 30.0, 200.0], np.float32)
    exact = logp.astype(np.float64) - np.log(-np.expm1(logp.astype(np.float64)))
    close(
        preference_losses.orpo(logp, np.full(9, np.log(0.5)), nll=np.zeros(9))[1]["log_odds_ratio"],
        exact,
    )


@pytest.mark.parametrize("kl", [-3.0, 0.0, 2.5])
def test_kto_is_its_formula(kl):
    p, r = sums(2)
    good = np.arange(13) % 3 > 0
    mismatched = np.asarray([kl - 1, kl + 2, kl - 1])
    beta, up, down = 0.2, 1.3, 0.7
    loss, diagnostics = preference_losses.kto(
        p, r, desirable=good, kl=mismatched, beta=beta, desirable_weight=up, undesirable_weight=down
    )
    z = max(kl, 0.0)
    value = np.where(good, up * sigmoid(beta * (p - r - z)), down * sigmoid(beta * (z - (p - r))))
    close(loss, np.where(good, up, down) - value)
    close(diagnostics["reward"], beta * (p - r))
    close(diagnostics["kl"], np.full(13, z))
    close(diagnostics["accuracy"], ((p - r) > z) == good)
    close(
        preference_losses.kto(
            p, r, desirable=good, kl=kl, beta=beta, desirable_weight=up, undesirable_weight=down
        )[0],
        loss,
    )
    through_kl = jax.grad(lambda kl: preference_losses.kto(p, r, desirable=good, kl=kl)[0].sum())(
        mismatched
    )
    assert not through_kl.any()


def test_kto_pushes_each_kind_its_own_way():
    p, r = sums(2)
    good = np.arange(13) % 2 == 0
    slope = jax.grad(lambda p: preference_losses.kto(p, r, desirable=good, kl=0.5)[0].sum())(p)
    assert (slope[good] < 0).all() and (slope[~good] > 0).all()


def token_case(seed=0):
    random = np.random.default_rng(seed)
    new, old, reference = (-3 * random.random((3, 5, 7))).astype(np.float32).astype(np.float64)
    mask = np.arange(7) < np.asarray([7, 1, 4, 0, 5])[:, None]
    return (
        new,
        old,
        reference,
        mask,
        random.standard_normal(5).astype(np.float32).astype(np.float64),
    )


@pytest.mark.parametrize("kl_weight", [0.0, 0.04, 1.0])
def test_grpo_is_its_formula(kl_weight):
    new, old, reference, mask, advantages = token_case()
    total = 0.0
    for i in range(5):
        terms = []
        for t in np.flatnonzero(mask[i]):
            ratio, r = np.exp(new[i, t] - old[i, t]), np.exp(reference[i, t] - new[i, t])
            surrogate = min(ratio * advantages[i], np.clip(ratio, 0.8, 1.2) * advantages[i])
            terms.append(surrogate - kl_weight * (r - np.log(r) - 1))
        total -= np.mean(terms) if terms else 0.0
    arguments = dict(mask=mask, advantages=advantages, reference=reference, kl_weight=kl_weight)
    actual, weight = preference_losses.grpo(new, old, **arguments)
    close(actual, total)
    assert weight == 4 and weight.dtype == jnp.float32
    junk = np.where(mask, 0.0, np.nan)
    close(
        preference_losses.grpo(
            new + junk, old - junk, **{**arguments, "reference": reference + junk}
        )[0],
        total,
    )
    halves = [
        preference_losses.grpo(
            new[s],
            old[s],
            mask=mask[s],
            advantages=advantages[s],
            reference=reference[s],
            kl_weight=kl_weight,
        )
        for s in (slice(2), slice(2, 5))
    ]
    close(sum(h[0] for h in halves), total)
    assert sum(h[1] for h in halves) == weight
    if kl_weight == 0:
        close(preference_losses.grpo(new, old, mask=mask, advantages=advantages)[0], total)


def test_grpo_at_the_old_policy_is_reinforce():
    """A categorical policy of 4 tokens: the gradient is that of -mean A mean log p.

    In closed form, (pi - onehot) A / length.
    """
    logits = np.asarray([0.3, -1.0, 0.8, 0.1], np.float32)
    _, _, _, mask, advantages = token_case()
    tokens = np.random.default_rng(1).integers(0, 4, (5, 7))
    logprobs = lambda logits: jax.nn.log_softmax(logits)[tokens]
    old = logprobs(logits)

    def loss(logits, reference):
        total, weight = preference_losses.grpo(
            logprobs(logits),
            old,
            mask=mask,
            advantages=advantages,
            reference=reference,
            kl_weight=0.5,
        )
        return total / weight

    pi = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    expected = np.zeros(4)
    for i in range(5):
        for t in np.flatnonzero(mask[i]):
            expected += advantages[i] * (pi - np.eye(4)[tokens[i, t]]) / mask[i].sum() / 4
    assert np.abs(expected).max() > 0.01
    close(jax.grad(loss)(logits, None), expected)
    close(
        jax.grad(loss)(logits, old), expected
    )  # the KL term is flat where policy and reference meet


def test_grpo_clips_what_would_gain_more():
    slope = lambda ratio, advantage: jax.grad(
        lambda x: preference_losses.grpo(
            x, jnp.zeros((1, 1)), mask=jnp.ones((1, 1)), advantages=jnp.asarray([advantage])
        )[0]
    )(jnp.log(jnp.asarray([[ratio]])))[0, 0]
    assert slope(1.3, 1.0) == 0 and slope(0.7, -1.0) == 0
    np.testing.assert_allclose(
        [slope(0.7, 1.0), slope(1.3, -1.0), slope(1.1, 2.0)], [-0.7, 1.3, -2.2], rtol=1e-5
    )


def test_gradients_stay_finite():
    ends = np.asarray([0.0, -1e-7, -1e-4, -1.0, -80.0, -1e4, -1e8], np.float32)
    a, b = (x.ravel() for x in np.meshgrid(ends, ends))
    zeros = np.zeros_like(a)
    losses = {
        "dpo": lambda a, b: preference_losses.dpo(
            a, b, reference_chosen=zeros, reference_rejected=zeros
        )[0],
        "ipo": lambda a, b: preference_losses.ipo(
            a, b, reference_chosen=zeros, reference_rejected=zeros
        )[0],
        "orpo": lambda a, b: preference_losses.orpo(a, b, nll=-a)[0],
        "kto": lambda a, b: (
            preference_losses.kto(a, zeros, desirable=zeros, kl=b)[0]
            + preference_losses.kto(b, zeros, desirable=zeros + 1, kl=a)[0]
        ),
        "grpo": lambda a, b: preference_losses.grpo(
            a[:, None],
            b[::-1, None],
            mask=zeros[:, None] + 1,
            advantages=zeros - 1,
            reference=b[:, None],
        )[0],
        "grpo up": lambda a, b: preference_losses.grpo(
            a[:, None],
            b[::-1, None],
            mask=zeros[:, None] + 1,
            advantages=zeros + 1,
            reference=b[:, None],
        )[0],
    }
    for name, loss in losses.items():
        value, (da, db) = jax.value_and_grad(
            lambda a, b, loss=loss: loss(a, b).sum(), argnums=(0, 1)
        )(a, b)
        assert all(np.isfinite(x).all() for x in (value, da, db)), name
        assert np.abs(da).max() > 0, name


def test_nothing_flows_into_the_reference():
    a, b = (x.astype(np.float32) for x in sums(2))
    tokens = (a[:, None], b[:, None])
    losses = {
        "dpo": lambda r: preference_losses.dpo(a, b, reference_chosen=r, reference_rejected=2 * r)[
            0
        ].sum(),
        "ipo": lambda r: preference_losses.ipo(a, b, reference_chosen=r, reference_rejected=2 * r)[
            0
        ].sum(),
        "kto": lambda r: preference_losses.kto(a, r, desirable=a > b, kl=r)[0].sum(),
        "grpo": lambda r: preference_losses.grpo(
            tokens[0], r[:, None], mask=tokens[0] < 0, advantages=r, reference=2 * r[:, None]
        )[0],
    }
    for name, loss in losses.items():
        assert not jax.grad(loss)(b).any(), name


def test_advantages_are_standard_scores_within_their_group():
    rewards = np.random.default_rng(2).standard_normal((6, 8)) * 5 + np.arange(6)[:, None] * 100
    actual = preference_losses.advantages(rewards, epsilon=0.0)
    close(
        actual, (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, ddof=1, keepdims=True)
    )
    close(
        preference_losses.advantages(rewards),
        (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4),
    )


def test_equal_rewards_teach_nothing():
    rewards = np.stack(
        [np.full(7, 0.1), np.full(7, 12345.6), np.arange(7) == 3, 0.5 + 1e-7 * (np.arange(7) % 2)]
    )
    actual = np.asarray(preference_losses.advantages(rewards))
    assert not actual[:2].any() and np.abs(actual[2]).max() > 1
    assert np.abs(actual[3]).max() < 0.01  # a rounding of the reward model is no signal
    assert not preference_losses.advantages(np.ones((3, 1))).any()


def test_wrong_shapes_are_refused():
    a = np.zeros(3)
    with pytest.raises(ValueError, match=r"shapes differ: \(3,\), \(3,\), \(3, 1\), \(3,\)"):
        preference_losses.dpo(a, a, reference_chosen=a[:, None], reference_rejected=a)
    with pytest.raises(ValueError, match="shapes differ"):
        preference_losses.orpo(a, a, nll=a[:2])
    with pytest.raises(ValueError, match="shapes differ"):
        preference_losses.kto(a, a, desirable=True, kl=0.0)
    with pytest.raises(ValueError, match=r"advantages \(2,\) \[N\]"):
        preference_losses.grpo(a[:, None], a[:, None], mask=a[:, None], advantages=a[:2])
    with pytest.raises(ValueError, match=r"must be \[G, n\]"):
        preference_losses.advantages(a)
