"""What a step minimises: next tokens, a head's label, preferences between answers, rewards.

In: final hidden states and a batch. Out: `LossSums`. To add an objective, write a function of the
form of `next_token`, add a row to OBJECTIVES, and name it in a `Task`. Answers of a pair are
neighbouring segments of one row, so a sum over an answer is one over the tokens of its segment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config.schema import Config, ModelConfig, TaskConfig
from gptjax.core.types import Array, Batch, Params
from gptjax.model import head as model_head
from gptjax.ops import collectives, cross_entropy
from gptjax.tasks.preference import SEGMENTS, WITH_REFERENCE
from gptjax.tasks.table import task_of
from gptjax.training import preference_losses


class LossSums(NamedTuple):
    """Sums over a batch, float32 scalars: losses, their weights, correct predictions (or 0).

    An objective gives a device's share of them (see `ops.collectives`).
    """

    loss: Array
    weight: Array
    correct: Array


def compute_loss(
    model: ModelConfig,
    task: TaskConfig,
    params: Params,
    x_BTD: Array,
    batch: Batch,
    *,
    chunk: int,
) -> LossSums:
    """The objective of the task on hidden states as `transformer.apply` returns them.

    chunk: positions whose logits exist at once.
    """
    name = "head" if model.labels else task_of(task).objective
    return OBJECTIVES[name](model, task, params, x_BTD, batch, chunk)


def batch_shapes(config: Config) -> Batch:
    """Shapes and dtypes [batch_size, T] (`jax.ShapeDtypeStruct`) of a batch of training."""
    task = task_of(config.task)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.train.batch_size, config.length), dtype)

    divergence = task.samples_rollouts and config.task.kl_coef
    with_reference = task.needs_reference(config.task) or divergence
    return Batch(
        tokens=array(jnp.int32),
        targets=array(task.label_dtype if config.model.labels else jnp.int32),
        loss_weights=array(jnp.float32),
        segment_ids=array(jnp.int32),
        positions=array(jnp.int32),
        reference=array(jnp.float32) if with_reference else None,
        advantages=array(jnp.float32) if task.samples_rollouts else None,
    )


def next_token(
    model: ModelConfig, task: TaskConfig, params: Params, x_BTD: Array, batch: Batch, chunk: int
) -> LossSums:
    """Cross-entropy of the next token, weighted."""
    weights = batch.loss_weights
    loss = model_head.token_cross_entropy(model, params, x_BTD, batch.targets, weights, chunk=chunk)
    return LossSums(loss, collectives.share(weights.sum(), "tensor"), jnp.zeros(()))


def head(
    model: ModelConfig, task: TaskConfig, params: Params, x_BTD: Array, batch: Batch, chunk: int
) -> LossSums:
    """Cross-entropy of a label or of each of a set, or half the squared error of a number."""
    weights = batch.loss_weights
    logits = model_head.score(params, x_BTD)
    is_set = model.problem == "multi_label_classification"
    loss_of = cross_entropy.label_set_loss if is_set else cross_entropy.label_loss
    loss, correct = loss_of(logits, batch.targets, weights)
    return _shared(LossSums(loss, weights.sum(), correct), "tensor")


def _shared(sums: LossSums, *axes: str) -> LossSums:
    """A device's share of sums that all along these axes computed alike."""
    return LossSums(*(collectives.share(value, *axes) for value in sums))


def _whole_rows(batch: Batch) -> Batch:
    """The batch with the whole sequence of each row."""
    return jax.tree.map(lambda array: collectives.gather(array, "context", 1), batch)


def preference(
    model: ModelConfig, task: TaskConfig, params: Params, x_BTD: Array, batch: Batch, chunk: int
) -> LossSums:
    """The loss `task.loss` on pairs of answers; correct: pairs whose chosen answer is likelier."""
    logp_BT = model_head.token_logprobs(model, params, x_BTD, batch.targets, chunk=chunk)
    logp_BT, batch = collectives.gather(logp_BT, "context", 1), _whole_rows(batch)
    weights, segments = batch.loss_weights, batch.segment_ids
    group = SEGMENTS[task.loss]
    count = logp_BT.shape[1] // group  # of examples that a row can hold

    def answers(values: Array) -> Array:
        """[group, B * count] sums of each example's answers."""
        return segment_sums(values, segments)[:, 1 : 1 + group * count].reshape(-1, group).T

    sums, lengths = answers(logp_BT * weights), answers(weights)
    exists = lengths[0] > 0
    reference = answers(batch.reference) if task.loss in WITH_REFERENCE else None
    loss, accuracy = PREFERENCE_LOSSES[task.loss](task, sums, lengths, reference)
    sums_of_pairs = LossSums(
        jnp.where(exists, loss, 0.0).sum(),
        exists.sum().astype(jnp.float32),
        (accuracy * exists).sum(),
    )
    return _shared(sums_of_pairs, "tensor", "context")


def grpo(
    model: ModelConfig, task: TaskConfig, params: Params, x_BTD: Array, batch: Batch, chunk: int
) -> LossSums:
    """Policy gradient on the model's own answers, by their advantages."""
    logp_BT = model_head.token_logprobs(model, params, x_BTD, batch.targets, chunk=chunk)
    logp_BT, batch = collectives.gather(logp_BT, "context", 1), _whole_rows(batch)
    # One update follows each set of answers, so the policy that wrote them is the one that is
    # updated: the ratio is 1, its gradient is not 0.
    loss, weight = preference_losses.grpo(
        logp_BT,
        jax.lax.stop_gradient(logp_BT),
        mask=batch.loss_weights,
        advantages=batch.advantages[:, 0],
        reference=batch.reference if task.kl_coef else None,
        kl_weight=task.kl_coef,
    )
    return _shared(LossSums(loss, weight, jnp.zeros(())), "tensor", "context")


# `Task.objective` names a row; a model with a head has the row "head".
OBJECTIVES: dict[str, Callable[[ModelConfig, TaskConfig, Params, Array, Batch, int], LossSums]] = {
    "next_token": next_token,
    "head": head,
    "preference": preference,
    "grpo": grpo,
}


def segment_sums(values_BT: Array, segments_BT: Array) -> Array:
    """[B, T + 1] sums over the positions of each segment number; column 0 is of no segment."""

    def of_row(values_T: Array, segments_T: Array) -> Array:
        return jax.ops.segment_sum(values_T, segments_T, num_segments=values_T.shape[0] + 1)

    return jax.vmap(of_row)(values_BT, segments_BT)


# The losses of pairs: (task, sums, lengths, reference), each [answers of an example, N], to (loss,
# accuracy) [N]. sums: log-probabilities of the answers; reference: the same before training.


def _against_reference(
    loss_of: Callable[..., preference_losses.Result],
    task: TaskConfig,
    sums: Array,
    lengths: Array,
    reference: Array,
) -> tuple[Array, Array]:
    loss, diagnostics = loss_of(
        sums[0],
        sums[1],
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        beta=task.beta,
    )
    return loss, diagnostics["accuracy"]


def _orpo(task: TaskConfig, sums: Array, lengths: Array, reference: None) -> tuple[Array, Array]:
    means = sums / jnp.maximum(lengths, 1)
    means = jnp.where(lengths[0] > 0, means, -1.0)  # a place without an example has no odds
    loss, diagnostics = preference_losses.orpo(means[0], means[1], nll=-means[0], weight=task.beta)
    return loss, diagnostics["accuracy"]


def _kto(task: TaskConfig, sums: Array, lengths: Array, reference: Array) -> tuple[Array, Array]:
    exists = lengths[0] > 0
    # The third answer belongs to another prompt: its log-ratio estimates the divergence.
    log_ratios = collectives.total(((sums - reference)[2] * exists).sum(), "data", "fsdp")
    kl = log_ratios / jnp.maximum(collectives.total(exists.sum(), "data", "fsdp"), 1)

    def of_answer(i: int) -> tuple[Array, Array]:
        loss, diagnostics = preference_losses.kto(
            sums[i],
            reference[i],
            desirable=jnp.full(exists.shape, i == 0),
            kl=kl,
            beta=task.beta,
        )
        return loss, diagnostics["accuracy"]

    chosen_loss, chosen_accuracy = of_answer(0)
    rejected_loss, rejected_accuracy = of_answer(1)
    return chosen_loss + rejected_loss, (chosen_accuracy + rejected_accuracy) / 2


PREFERENCE_LOSSES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "dpo": functools.partial(_against_reference, preference_losses.dpo),
    "ipo": functools.partial(_against_reference, preference_losses.ipo),
    "orpo": _orpo,
    "kto": _kto,
}
