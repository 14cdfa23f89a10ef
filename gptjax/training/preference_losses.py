"""Losses that tune a policy on preferences, as pure functions: DPO, IPO, ORPO, KTO and GRPO.

In: log-probabilities of complete answers under the policy and under a frozen reference: sums over
the tokens of an answer (ORPO: means; GRPO: single tokens). Out: (loss [N], {name: diagnostic [N]}),
float32, for the caller to average; GRPO gives (sum, weight). Gradients flow through the policy's
log-probabilities alone. To add a loss, write a function that returns the same pair, and a row in
PREFERENCE_LOSSES of `objectives.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.core.types import Array

Result = tuple[Array, dict[str, Array]]


# ORPO: a mean log-probability above this counts as this, where the odds are still finite.
_NEARLY_CERTAIN = -1e-6

# GRPO: from here on exp is replaced by its tangent, so that the gradient stays finite.
_STEEP = 10.0


def dpo(
    chosen: Any,
    rejected: Any,
    *,
    reference_chosen: Any,
    reference_rejected: Any,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Result:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7).

    All arrays are [N], log-probabilities of answers. beta > 0: how closely to stay at the
    reference. label_smoothing in [0, 0.5): the fraction of pairs believed to be labelled the wrong
    way round (conservative DPO, Mitchell 2023). Raises ValueError on unequal shapes.
    """
    rewards = _rewards(beta, chosen, rejected, reference_chosen, reference_rejected)
    margin = rewards["reward_margin"]
    preferred, reversed_ = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * preferred - label_smoothing * reversed_, rewards


def ipo(
    chosen: Any, rejected: Any, *, reference_chosen: Any, reference_rejected: Any, beta: float = 0.1
) -> Result:
    """Identity preference optimization (Azar et al. 2024): pulls the log-ratio to 1 / (2 beta).

    beta is the paper's tau. Arguments and errors are as in `dpo`; for long answers, means over
    tokens are better than sums.
    """
    rewards = _rewards(beta, chosen, rejected, reference_chosen, reference_rejected)
    return jnp.square(rewards["reward_margin"] / beta - 1 / (2 * beta)), rewards


def orpo(chosen: Any, rejected: Any, *, nll: Any, weight: float = 0.1) -> Result:
    """Odds ratio preference optimization (Hong et al. 2024, eqs. 6 and 7), without a reference.

    All arrays are [N]. chosen, rejected: mean log-probability per token of the answers, at most 0.
    nll: negative log-likelihood of the chosen answer, as in fine-tuning. weight: the paper's
    lambda. Diagnostics: the weighted log-probabilities as rewards, and the log of the odds ratio.
    Raises ValueError on unequal shapes.
    """
    chosen, rejected, nll = _same_shape(chosen, rejected, nll)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    rewards = _compare(weight * chosen, weight * rejected)
    loss = nll - weight * jax.nn.log_sigmoid(log_odds_ratio)
    return loss, {**rewards, "log_odds_ratio": log_odds_ratio}


def kto(
    logprobs: Any,
    reference: Any,
    *,
    desirable: Any,
    kl: Any,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): single answers, desirable or not.

    logprobs, reference: [N], of the answers under policy and reference. desirable: bool [N]. kl:
    log-ratios of policy to reference for answers to other prompts, [M] or their mean; the paper's
    z_0 is formed from them here (mean, clamp at 0, stopped gradient). The weights balance unequal
    numbers of the two kinds. Diagnostics: reward, whether it is on the correct side of z_0, and
    z_0 itself ("kl"). Raises ValueError on unequal shapes.
    """
    logprobs, reference, desirable = _same_shape(logprobs, reference, desirable)
    ratio = logprobs - jax.lax.stop_gradient(reference)
    point = jax.lax.stop_gradient(jnp.maximum(jnp.mean(jnp.asarray(kl, jnp.float32)), 0.0))
    good = desirable > 0
    advantage = jnp.where(good, ratio - point, point - ratio)
    loss = jnp.where(good, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-beta * advantage)
    accuracy = (advantage > 0).astype(jnp.float32)
    return loss, {
        "reward": beta * ratio,
        "accuracy": accuracy,
        "kl": jnp.broadcast_to(point, loss.shape),
    }


def grpo(
    logprobs: Any,
    old: Any,
    *,
    mask: Any,
    advantages: Any,
    reference: Any = None,
    clip: float = 0.2,
    kl_weight: float = 0.04,
) -> tuple[Array, Array]:
    """Group relative policy optimization (Shao et al. 2024, eq. 3).

    Returns (sum over answers of the mean loss of their tokens, number of answers).

    logprobs, old, reference: log-probabilities of single tokens [N, T] under the policy, under the
    policy that wrote them, and under the reference (None: no KL term). mask [N, T]: 1 on tokens of
    an answer; a row without any does not count. advantages [N]: `advantages`, flattened. clip: the
    distance of the ratio from 1 beyond which nothing more is gained. kl_weight: the paper's beta,
    the weight of the k3 estimator r - 1 - log r of KL(policy | reference), r = reference / policy
    (Schulman 2020). Where a ratio exceeds e^10, a line replaces exp. Raises ValueError on unequal
    shapes.
    """
    logprobs, old, mask, reference = _same_shape(
        logprobs, old, mask, logprobs if reference is None else reference
    )
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
    if logprobs.ndim != 2 or advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"log-probabilities {logprobs.shape} must be [N, T] and advantages "
            f"{advantages.shape} [N]"
        )
    seen = mask > 0
    ratio = _exp(jnp.where(seen, logprobs - jax.lax.stop_gradient(old), 0.0))
    gain = jnp.minimum(
        ratio * advantages[:, None], jnp.clip(ratio, 1 - clip, 1 + clip) * advantages[:, None]
    )
    log_r = jnp.where(seen, jax.lax.stop_gradient(reference) - logprobs, 0.0)
    loss = kl_weight * (_exp(log_r) - 1 - log_r) - gain
    lengths = seen.sum(1)
    sums = jnp.where(seen, loss, 0.0).sum(1) / jnp.maximum(lengths, 1)
    return sums.sum(), (lengths > 0).sum().astype(jnp.float32)


def advantages(rewards: Any, *, epsilon: float = 1e-4) -> Array:
    """(reward - mean) / (standard deviation + epsilon) within each group, float32 [G, n].

    rewards: [G, n], of n answers to each of G prompts. The deviation is that of a sample (n - 1),
    as in the public implementations. A group whose rewards are all equal, or that has a single
    answer, teaches nothing: its advantages are exactly 0. epsilon keeps differences much smaller
    than itself (rounding of a reward model) near 0. Raises ValueError unless rewards have two axes.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2:
        raise ValueError(f"rewards {rewards.shape} must be [G, n]: n answers to each of G prompts")
    centred = rewards - rewards.mean(1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).sum(1, keepdims=True) / max(rewards.shape[1] - 1, 1))
    # The mean of equal rewards may be off by a rounding, and so may each difference from it.
    equal = rewards.max(1, keepdims=True) == rewards.min(1, keepdims=True)
    return jnp.where(equal, 0.0, centred / (deviation + epsilon))


def _rewards(
    beta: float, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any
) -> dict[str, Array]:
    chosen, rejected, *reference = _same_shape(
        chosen, rejected, reference_chosen, reference_rejected
    )
    frozen_chosen, frozen_rejected = jax.lax.stop_gradient(reference)
    return _compare(beta * (chosen - frozen_chosen), beta * (rejected - frozen_rejected))


def _compare(chosen: Array, rejected: Array) -> dict[str, Array]:
    margin = chosen - rejected
    accuracy = (margin > 0).astype(jnp.float32)
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": margin,
        "accuracy": accuracy,
    }


def _same_shape(*arrays: Any) -> tuple[Array, ...]:
    """As float32. Without this check, [N] and [N, 1] would broadcast to [N, N]."""
    floats = tuple(jnp.asarray(a, jnp.float32) for a in arrays)
    if len({a.shape for a in floats}) > 1:
        raise ValueError(f"shapes differ: {', '.join(str(a.shape) for a in floats)}")
    return floats


def _log_odds(log_p: Array) -> Array:
    """log(p / (1 - p)) of log p <= 0; expm1 keeps the digits of 1 - p where p is near 1."""
    log_p = jnp.minimum(log_p, _NEARLY_CERTAIN)
    return log_p - jnp.log(-jnp.expm1(log_p))


def _exp(x: Array) -> Array:
    """exp, and its tangent from `_STEEP` on."""
    return jnp.where(
        x > _STEEP, jnp.exp(_STEEP) * (1 + x - _STEEP), jnp.exp(jnp.minimum(x, _STEEP))
    )
