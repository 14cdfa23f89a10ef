"""The train state and the compiled steps: one program for training, one for evaluation.

The loss of a step is sum / weight over the whole global batch, formed once after accumulation and across all devices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import losses, model, optim, sharding
from gptjax.config import Config

Array = jax.Array
Batch = dict[str, Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "rng"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """step: int32, steps done. rng: key data (uint32), the root of all dropout."""

    step: Array
    params: Any
    opt_state: Any
    rng: Array


def new_state(config: Config, tx: optax.GradientTransformation, *, rows_sharding: jax.sharding.Sharding | None = None) -> TrainState:
    """The state before the first step, a function of `train.seed` alone."""
    params_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))
    params = model.init_params(config.model, params_key, rows_sharding=rows_sharding)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key_data(dropout_key))


def state_shapes(config: Config) -> tuple[TrainState, optax.GradientTransformation]:
    """(shapes and dtypes of the state, optimizer); nothing is materialised."""
    params = jax.eval_shape(functools.partial(model.init_params, config.model), jax.random.key(0))
    tx = optim.optimizer(config, params)
    return jax.eval_shape(functools.partial(new_state, config, tx)), tx


def init_state(config: Config, mesh: Mesh, params: Any = None) -> TrainState:
    """A new state, each array made where it lives; with `params` (host arrays), those instead of random ones."""
    shapes, tx = state_shapes(config)
    if params is not None:
        places = sharding.shardings(mesh, shapes)
        rng = jax.random.key_data(jax.random.split(jax.random.key(config.train.seed))[1])
        fill = lambda params, rng: TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), rng)
        return jax.jit(fill, out_shardings=places, donate_argnums=0)(sharding.place(params, places.params), rng)
    rows_sharding = NamedSharding(mesh, P(sharding.AXES))
    return jax.jit(functools.partial(new_state, config, tx, rows_sharding=rows_sharding), out_shardings=sharding.shardings(mesh, shapes))()


@jax.jit
def all_finite(params: Any) -> Array:
    """bool scalar: no parameter is NaN or infinite."""
    return jnp.all(jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]))


def loss_sum(config: Config, params: Any, batch: Batch, dropout_key: Array | None, *, devices: int) -> tuple[Array, Array]:
    """(sum of weighted token losses, sum of weights). `devices` that share the rows decide how many logits exist at once."""
    x, _ = model.apply(config.model, params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], dropout_key=dropout_key)
    rows, length = batch["tokens"].shape
    chunk = losses.chunk_length(config.model, max(rows // devices, 1), length, config.train.loss_chunk)
    total = losses.token_cross_entropy(config.model, params, x, batch["targets"], batch["loss_weights"], chunk=chunk)
    return total, batch["loss_weights"].sum()


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`step(state, batch) -> (state, {"loss", "grad_norm", "lr", "tokens"})`, jitted; the state is donated.

    The batch holds [batch_size, T] arrays sharded by `sharding.BATCH`.
    """
    shapes, tx = state_shapes(config)
    count = config.train.accumulate
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rate = optim.schedule(config)
    grad = jax.value_and_grad(lambda *a: loss_sum(config, *a, devices=devices), has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if count == 1:
            (total, weight), grads = grad(state.params, batch, key)
        else:
            # row i goes to micro-batch i mod count, so each device splits the rows that it holds
            micro = {name: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1) for name, a in batch.items()}

            def add(carry: Any, piece: tuple[Array, Batch]) -> tuple[Any, None]:
                number, rows = piece
                (total, weight), grads = grad(state.params, rows, jax.random.fold_in(key, number))
                return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

            zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (total, weight, grads), _ = jax.lax.scan(add, zero, (jnp.arange(count), micro))
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {"loss": total / weight, "grad_norm": optax.tree.norm(grads), "lr": rate(state.step), "tokens": weight}
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.rng), metrics

    out = (sharding.shardings(mesh, shapes), None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def make_eval_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`step(params, batch) -> (loss sum, weight)`, jitted, without dropout."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return jax.jit(lambda params, batch: loss_sum(config, params, batch, None, devices=devices))
