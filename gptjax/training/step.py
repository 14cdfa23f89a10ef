"""The train state and the compiled steps: one program for training, one for evaluation.

The loss of a step is sum / weight over the whole global batch, formed once after accumulation and across all devices. Where adapters are trained
(`config.lora`), the state holds only them, and the frozen parameters stand beside it as an argument.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config.schema import Config
from gptjax.core import tree
from gptjax.core.types import Array, Batch, TrainState
from gptjax.model import init as model_init
from gptjax.model import lora, quantize, transformer
from gptjax.ops import cross_entropy
from gptjax.runtime import sharding
from gptjax.training import objectives, optim


def init_trained(
    config: Config,
    key: Array,
    frozen: Any,
    given: Any,
    *,
    rows_sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """The parameters that training changes, before the first step: the whole model, or adapters on `frozen` ones beside what is `given`."""
    if not config.lora.on:
        return model_init.init_params(config.model, key, rows_sharding=rows_sharding)
    return lora.merge_trees(lora.init(config.model, config.lora, key, frozen), given)


def split_base_and_trainable(config: Config, params: Any) -> tuple[Any, Any]:
    """(what adapters stand on, what is trained on beside them: a head for classes, prompt vectors) of a checkpoint; nothing where all is trained."""
    if not config.lora.on:
        return {}, {}
    given = {"score": params["score"]} if config.model.labels else {}
    if "prompt" in params["embed"]:
        given["embed"] = {"prompt": params["embed"]["prompt"]}
    base = {name: part for name, part in params.items() if name != "score"}
    return base | {
        "embed": {name: part for name, part in params["embed"].items() if name != "prompt"}
    }, given


def prepare_base(config: Config, base: Any) -> Any:
    """The base of adapters as the step reads it: as it is, or with its matrices in int8."""
    return (
        quantize.inference_params(base, weights="int8")
        if config.lora.base == "int8" and base
        else base
    )


def new_state(
    config: Config,
    tx: optax.GradientTransformation,
    frozen: Any,
    given: Any,
    *,
    rows_sharding: jax.sharding.Sharding | None = None,
) -> TrainState:
    """The state before the first step, a function of `train.seed` and the checkpoint's parameters alone."""
    params_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))
    params = init_trained(config, params_key, frozen, given, rows_sharding=rows_sharding)
    return TrainState(
        jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key_data(dropout_key)
    )


def state_shapes(config: Config) -> tuple[TrainState, optax.GradientTransformation, Any]:
    """(shapes and dtypes of the state, optimizer, those of the frozen parameters); nothing is materialised."""
    base, given = split_base_and_trainable(config, model_init.param_shapes(config.model))
    frozen = jax.eval_shape(functools.partial(prepare_base, config), base)
    params = jax.eval_shape(
        lambda frozen, given: init_trained(config, jax.random.key(0), frozen, given), frozen, given
    )
    tx = optim.optimizer(config, params)
    return jax.eval_shape(functools.partial(new_state, config, tx), frozen, given), tx, frozen


def init_state(config: Config, mesh: Mesh, params: Any = None) -> tuple[TrainState, Any]:
    """(a new state, the frozen parameters), each array made where it lives. `params` (host arrays): the checkpoint that training starts from."""
    shapes, tx, _ = state_shapes(config)
    places = sharding.shardings(mesh, shapes)
    rows_sharding = NamedSharding(mesh, P(sharding.AXES))
    make = functools.partial(new_state, config, tx, rows_sharding=rows_sharding)
    if config.lora.on:
        frozen = place_frozen(config, mesh, params)
        return jax.jit(make, out_shardings=places)(
            frozen, split_base_and_trainable(config, params)[1]
        ), frozen
    if params is None:
        return jax.jit(make, out_shardings=places)({}, {}), {}
    rng = jax.random.key_data(jax.random.split(jax.random.key(config.train.seed))[1])
    fill = lambda params, rng: TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), rng)
    return jax.jit(fill, out_shardings=places, donate_argnums=0)(
        sharding.place(params, places.params), rng
    ), {}


def place_frozen(config: Config, mesh: Mesh, params: Any) -> Any:
    """The base of adapters over the mesh, from host arrays; nothing where the whole model is trained."""
    if not config.lora.on:
        return {}
    places = sharding.shardings(mesh, state_shapes(config)[2])
    host, _ = split_base_and_trainable(config, params)
    if config.lora.base == "int8":
        return jax.jit(functools.partial(prepare_base, config), out_shardings=places)(host)
    return sharding.place(host, places)


@jax.jit
def all_finite(params: Any) -> Array:
    """bool scalar: no parameter is NaN or infinite."""
    return jnp.all(jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]))


def loss_sum(
    config: Config,
    params: Any,
    frozen: Any,
    batch: Batch,
    dropout_key: Array | None,
    *,
    devices: int,
) -> tuple[Array, tuple[Array, Array]]:
    """(sum of weighted losses, (sum of weights, sum of a head's right answers)). `devices` that share the rows decide how many logits exist at once."""
    params = tree.map_with_path(
        lambda path, p: jax.lax.stop_gradient(p) if tree.matches(config.optim.freeze, path) else p,
        params,
    )
    whole = lora.apply_adapter(config.lora, frozen, params, dropout=dropout_key is not None)
    x, _ = transformer.apply(
        config.model,
        whole,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        dropout_key=dropout_key,
    )
    rows, length = batch.tokens.shape
    chunk = cross_entropy.chunk_length(
        config.model, max(rows // devices, 1), length, config.train.loss_chunk
    )
    total, weight, right = objectives.compute_loss(config, whole, x, batch, chunk=chunk)
    return total, (weight, right)


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`step(state, batch, frozen) -> (state, {"loss", "grad_norm", "lr", "tokens"})`, jitted; the state is donated.

    The batch holds [batch_size, T] arrays sharded by `sharding.BATCH`.
    """
    shapes, tx, _ = state_shapes(config)
    count = config.train.grad_accum_steps
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rate = optim.schedule(config)
    grad = jax.value_and_grad(lambda *a: loss_sum(config, *a, devices=devices), has_aux=True)

    def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if count == 1:
            (total, (weight, _)), grads = grad(state.params, frozen, batch, key)
        else:
            # row i goes to micro-batch i mod count, so each device splits the rows that it holds
            micro = jax.tree.map(
                lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch
            )

            def add(carry: Any, piece: tuple[Array, Batch]) -> tuple[Any, None]:
                number, rows = piece
                (total, (weight, _)), grads = grad(
                    state.params, frozen, rows, jax.random.fold_in(key, number)
                )
                return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

            zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (total, weight, grads), _ = jax.lax.scan(add, zero, (jnp.arange(count), micro))
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": total / weight,
            "grad_norm": optax.tree.norm(grads),
            "lr": rate(state.step),
            "tokens": weight,
        }
        return TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.rng
        ), metrics

    out = (sharding.shardings(mesh, shapes), None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def make_eval_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`step(params, batch, frozen) -> (loss sum, weight, right answers)`, jitted, without dropout."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def step(params: Any, batch: Batch, frozen: Any) -> tuple[Array, Array, Array]:
        total, (weight, right) = loss_sum(config, params, frozen, batch, None, devices=devices)
        return total, weight, right

    return jax.jit(step)
