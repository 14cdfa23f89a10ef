"""What a step minimises: next tokens, a head's label, preferences between answers, rewards.

In: final hidden states and a batch. Out: (loss sum, weight, correct predictions), float32 scalars.
To add one, write a function of that form, add a row to OBJECTIVES, and name it in a `Task`.
Sums over a segment are sums over its tokens: answers of a pair are neighbouring segments of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config.schema import Config
from gptjax.core.types import Array, Batch
from gptjax.model import transformer
from gptjax.ops import cross_entropy
from gptjax.tasks.preference import SEGMENTS, WITH_REFERENCE
from gptjax.tasks.table import task_of
from gptjax.training import preference_losses

Sums = tuple[Array, Array, Array]


def compute_loss(config: Config, params: Any, x_BTD: Array, batch: Batch, *, chunk: int) -> Sums:
    """The task's objective on hidden states as `transformer.apply` returns them."""
    name = "head" if config.model.labels else task_of(config.task).objective
    return OBJECTIVES[name](config, params, x_BTD, batch, chunk)


def _next_token(config: Config, params: Any, x_BTD: Array, batch: Batch, chunk: int) -> Sums:
    weights = batch.loss_weights
    total = cross_entropy.token_cross_entropy(
        config.model, params, x_BTD, batch.targets, weights, chunk=chunk
    )
    return total, weights.sum(), jnp.zeros(())


def _head(config: Config, params: Any, x_BTD: Array, batch: Batch, chunk: int) -> Sums:
    weights = batch.loss_weights
    scores = transformer.score(params, x_BTD)
    total, correct = cross_entropy.head_loss(scores, batch.targets, weights)
    return total, weights.sum(), correct


def segment_sums(values_BT: Array, segments_BT: Array) -> Array:
    """[B, T + 1] sums over the positions of each segment number; column 0 is what is no segment."""
    one = lambda values, segments: jax.ops.segment_sum(
        values, segments, num_segments=values.shape[0] + 1
    )
    return jax.vmap(one)(values_BT, segments_BT)


def _preference(config: Config, params: Any, x_BTD: Array, batch: Batch, chunk: int) -> Sums:
    logp_BT = cross_entropy.token_logprobs(config.model, params, x_BTD, batch.targets, chunk=chunk)
    weights, segments = batch.loss_weights, batch.segment_ids
    group = SEGMENTS[config.task.loss]
    count = logp_BT.shape[1] // group  # of examples that a row can hold

    def answers(values: Array) -> Array:
        """[group, B * count] sums of each example's answers."""
        return segment_sums(values, segments)[:, 1 : 1 + group * count].reshape(-1, group).T

    sums, lengths = answers(logp_BT * weights), answers(weights)
    there = lengths[0] > 0
    reference = answers(batch.reference) if config.task.loss in WITH_REFERENCE else None
    if config.task.loss == "orpo":
        means = sums / jnp.maximum(lengths, 1)
        means = jnp.where(there, means, -1.0)  # an empty place has no odds
        loss, found = preference_losses.orpo(
            means[0], means[1], nll=-means[0], weight=config.task.beta
        )
    elif config.task.loss == "kto":
        assert reference is not None
        kl = ((sums - reference)[2] * there).sum() / jnp.maximum(there.sum(), 1)
        both = [
            preference_losses.kto(
                sums[i],
                reference[i],
                desirable=jnp.full(there.shape, i == 0),
                kl=kl,
                beta=config.task.beta,
            )
            for i in (0, 1)
        ]
        loss, found = (
            both[0][0] + both[1][0],
            {"accuracy": (both[0][1]["accuracy"] + both[1][1]["accuracy"]) / 2},
        )
    else:
        assert reference is not None
        function = {"dpo": preference_losses.dpo, "ipo": preference_losses.ipo}[config.task.loss]
        loss, found = function(
            sums[0],
            sums[1],
            reference_chosen=reference[0],
            reference_rejected=reference[1],
            beta=config.task.beta,
        )
    return (
        jnp.where(there, loss, 0.0).sum(),
        there.sum().astype(jnp.float32),
        (found["accuracy"] * there).sum(),
    )


def _grpo(config: Config, params: Any, x_BTD: Array, batch: Batch, chunk: int) -> Sums:
    logp_BT = cross_entropy.token_logprobs(config.model, params, x_BTD, batch.targets, chunk=chunk)
    reference = batch.reference if config.task.kl_coef else None
    advantages = batch.advantages[:, 0]
    # one update follows each set of answers, so the policy that wrote them is the one that is
    # updated: the ratio is 1, its gradient is not 0
    total, weight = preference_losses.grpo(
        logp_BT,
        jax.lax.stop_gradient(logp_BT),
        mask=batch.loss_weights,
        advantages=advantages,
        reference=reference,
        kl_weight=config.task.kl_coef,
    )
    return total, weight, jnp.zeros(())


# `Task.objective` names a row; a model with a head has the row "head".
OBJECTIVES: dict[str, Callable[[Config, Any, Array, Batch, int], Sums]] = {
    "next_token": _next_token,
    "head": _head,
    "preference": _preference,
    "grpo": _grpo,
}
