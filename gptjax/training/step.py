"""The compiled steps: one program for training, one for evaluation.

The loss of a step is sum / weight over the whole global batch, formed once, after accumulation and
across all devices. Loss and gradient are computed by each device on its own part, with the traffic
that `ops/collectives.py` and the model name; the optimizer's update is left to XLA's partitioner:
it has no traffic but the norm of the gradient (and what optimizers of whole matrices need).
Everything here takes the `TrainPlan`; `lower` needs nothing else, so a step can
be compiled ahead of time, also for devices that are described rather than present.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from gptjax.core import tree
from gptjax.core.types import Array, Batch, Params, TrainState
from gptjax.model import head, lora, transformer
from gptjax.ops import collectives
from gptjax.runtime import sharding
from gptjax.training import objectives
from gptjax.training import state as train_state
from gptjax.training.objectives import LossSums
from gptjax.training.setup import TrainPlan

Metrics = dict[str, Array]


class StateAndFrozen(NamedTuple):
    """What a step changes, and the parameters under adapters (empty where all are trained)."""

    state: TrainState
    frozen: Params


def init_state(plan: TrainPlan, params: Params | None = None) -> StateAndFrozen:
    """A new state and the frozen parameters, each array made where it lives.

    params: the checkpoint that training starts from, as host arrays; None draws random ones.
    """
    config, shardings = plan.config, plan.state_shardings
    new_state = functools.partial(train_state.new_state, config, plan.optimizer, mesh=plan.mesh)
    if config.lora.on:
        assert params is not None
        frozen = place_frozen(plan, params)
        trainable = train_state.split_base_and_trainable(config, params).trainable
        state = jax.jit(new_state, out_shardings=shardings)(frozen, trainable)
        return StateAndFrozen(state, frozen)
    if params is None:
        return StateAndFrozen(jax.jit(new_state, out_shardings=shardings)({}, {}), {})
    rng = jax.random.key_data(jax.random.split(jax.random.key(config.train.seed))[1])
    from_params = functools.partial(train_state.state_from_params, plan.optimizer)
    fill = jax.jit(from_params, out_shardings=shardings, donate_argnums=0)
    return StateAndFrozen(fill(sharding.place(params, shardings.params), rng), {})


def place_frozen(plan: TrainPlan, params: Params | None) -> Params:
    """The parameters under adapters, from host arrays, over the mesh; or nothing."""
    config, shardings = plan.config, plan.frozen_shardings
    if not config.lora.on:
        return {}
    assert params is not None
    base = train_state.split_base_and_trainable(config, params).base
    if config.lora.base == "int8":
        prepare = functools.partial(train_state.prepare_base, config)
        return jax.jit(prepare, out_shardings=shardings)(base)
    return sharding.place(base, shardings)


def hidden_states(
    plan: TrainPlan, params: Params, frozen: Params, batch: Batch, dropout_key: Array | None
) -> tuple[Params, Array]:
    """All parameters of the model, and what it makes of a batch [B, T, D].

    dropout_key: None in evaluation.
    """
    dropout = dropout_key is not None
    params = lora.apply_adapter(plan.config.lora, frozen, params, dropout=dropout)
    x_BTD, _ = transformer.apply(
        plan.model,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        dropout_key=dropout_key,
    )
    return params, x_BTD


def compute_loss(
    plan: TrainPlan,
    params: Params,
    frozen: Params,
    batch: Batch,
    dropout_key: Array | None,
    *,
    chunk: int,
) -> LossSums:
    """A device's share of the objective on a batch. No gradient flows to parameters that
    `optim.freeze` names.

    chunk: positions whose logits exist at once. dropout_key: None in evaluation.
    """
    config = plan.config

    def stop_frozen(path: str, param: Array) -> Array:
        frozen_here = tree.matches(config.optim.freeze, path)
        return jax.lax.stop_gradient(param) if frozen_here else param

    params = tree.map_with_path(stop_frozen, params)
    params, x_BTD = hidden_states(plan, params, frozen, batch, dropout_key)
    return objectives.compute_loss(plan.model, config.task, params, x_BTD, batch, chunk=chunk)


def make_train_step(plan: TrainPlan) -> jax.stages.Wrapped:
    """`step(state, batch, frozen) -> (state, {"loss", "grad_norm", "lr", "tokens"})`, jitted.

    The batch holds [batch_size, T] arrays sharded by `sharding.BATCH`. The state is donated.
    """
    gradient = make_gradient(plan)

    def step(state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        total, weight, grads = gradient(state.params, frozen, batch, key)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": total / weight,
            "grad_norm": optax.tree.norm(grads),
            "lr": plan.schedule(state.step),
            "tokens": weight,
        }
        new_state = TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.rng
        )
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(plan.state_shardings, None))


def make_gradient(plan: TrainPlan) -> Any:
    """`gradient(params, frozen, batch, key) -> (loss sum, weight, gradient of the sum)`.

    Sums over all micro-batches of a batch and over all devices, float32, split as the parameters
    are. Call it inside `jax.jit`.
    """
    count, freeze = plan.micro_batches, plan.config.optim.freeze
    specs = sharding.specs(plan.state_shapes.params)

    def loss_of(params: Params, frozen: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        sums = compute_loss(plan, params, frozen, batch, key, chunk=plan.loss_chunk)
        return sums.loss, sums.weight

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def of_one(params: Params, frozen: Params, batch: Batch, key: Array) -> Any:
        (total, weight), grads = value_and_grad(params, frozen, batch, key)
        return total, weight, grads

    def of_many(params: Params, frozen: Params, batch: Batch, key: Array) -> Any:
        def add(sums: Any, piece: tuple[Array, Batch]) -> tuple[Any, None]:
            number, rows = piece
            new = of_one(params, frozen, rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, new), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        sums, _ = jax.lax.scan(add, zero, (jnp.arange(count), split_rows(batch, count)))
        return sums

    def sum_of_copies(path: str, grad: Array, spec: P) -> Array:
        if tree.matches(freeze, path):  # 0 on every device
            return grad
        return collectives.total(grad, *sharding.axes_without(spec))

    def of_device(params: Params, frozen: Params, batch: Batch, key: Array) -> Any:
        total, weight, grads = (of_one if count == 1 else of_many)(params, frozen, batch, key)
        grads = tree.map_with_path(sum_of_copies, grads, specs)
        return (*(collectives.total(x, *sharding.AXES) for x in (total, weight)), grads)

    return on_parts(plan, of_device, out_specs=(P(), P(), specs))


def split_rows(batch: Batch, count: int) -> Batch:
    """[B, T] arrays as [count, B / count, T]: row i goes to micro-batch i mod count, so each device
    splits the rows that it holds."""

    def split(array: Array) -> Array:
        return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def lower(plan: TrainPlan) -> jax.stages.Lowered:
    """The training step for the plan's devices, ready to be compiled, from shapes alone."""
    with jax.set_mesh(plan.mesh):
        step = make_train_step(plan)
        return step.lower(plan.state_shapes, plan.batch_shapes, plan.frozen_shapes)


def make_eval_step(plan: TrainPlan) -> jax.stages.Wrapped:
    """`step(params, batch, frozen) -> LossSums`, jitted, without dropout."""

    # as many rows at once as in training; KTO's estimate of the divergence is of all pairs together
    count = 1 if plan.config.task.loss == "kto" else plan.micro_batches

    def of_device(params: Params, frozen: Params, batch: Batch) -> LossSums:
        def of_rows(rows: Batch) -> LossSums:
            return compute_loss(plan, params, frozen, rows, None, chunk=plan.loss_chunk)

        if count == 1:
            sums = of_rows(batch)
        else:
            of_each = jax.lax.map(of_rows, split_rows(batch, count))
            sums = jax.tree.map(lambda values: values.sum(0), of_each)
        return LossSums(*(collectives.total(value, *sharding.AXES) for value in sums))

    of_parts = on_parts(plan, of_device, out_specs=P())

    def step(params: Params, batch: Batch, frozen: Params) -> LossSums:
        return of_parts(params, frozen, batch)

    return jax.jit(step)


def make_logprobs_step(plan: TrainPlan) -> jax.stages.Wrapped:
    """`step(params, batch, frozen)`, jitted: log p of each target of a batch, float32 [B, T],
    without dropout."""

    def of_device(params: Params, frozen: Params, batch: Batch) -> Array:
        def of_rows(rows: Batch) -> Array:
            whole, x_BTD = hidden_states(plan, params, frozen, rows, None)
            return head.token_logprobs(
                plan.model, whole, x_BTD, rows.targets, chunk=plan.loss_chunk
            )

        if plan.micro_batches == 1:
            return of_rows(batch)
        of_each = jax.lax.map(of_rows, split_rows(batch, plan.micro_batches))
        return of_each.swapaxes(0, 1).reshape(batch.targets.shape)

    of_parts = on_parts(plan, of_device, out_specs=sharding.BATCH)

    def step(params: Params, batch: Batch, frozen: Params) -> Array:
        return of_parts(params, frozen, batch)

    return jax.jit(step, out_shardings=plan.batch_sharding)


def on_parts(plan: TrainPlan, function: Callable[..., Any], *, out_specs: Any) -> Any:
    """`function(params, frozen, batch, *rest)`, run by each device on its parts of the first three.

    Call it inside `jax.jit`.
    """

    def call(params: Params, frozen: Params, batch: Batch, *rest: Any) -> Any:
        frozen = lora.with_lengths(plan.config.lora, frozen, params)
        of_rest = (P(),) * len(rest)
        in_specs = (sharding.specs(params), sharding.specs(frozen), sharding.BATCH, *of_rest)
        of_each = sharding.on_each_device(
            plan.mesh, function, in_specs=in_specs, out_specs=out_specs
        )
        return of_each(params, frozen, batch, *rest)

    return call
