"""The train state before the first step, as pure functions of a config, a key and parameters.

Where adapters are trained (`config.lora`), the state holds only them (and a new head or prompt
vectors); the frozen parameters under them are a separate argument of every step. `init_state` in
`step.py` makes these arrays on the devices where they live.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptjax.config.schema import Config
from gptjax.core.types import Array, Params, TrainState
from gptjax.model import init as model_init
from gptjax.model import lora, quantize


class BaseAndTrainable(NamedTuple):
    """The parameters of a checkpoint, divided for training with adapters.

    base: frozen, under the adapters. trainable: trained as they are, next to the adapters: a head
    for classes, prompt vectors. Both are empty where all parameters are trained.
    """

    base: Params
    trainable: Params


def split_base_and_trainable(config: Config, params: Params) -> BaseAndTrainable:
    """Divides the parameters of a checkpoint (arrays or shapes) for training with adapters."""
    if not config.lora.on:
        return BaseAndTrainable({}, {})
    embed = dict(params["embed"])
    trainable: Params = {}
    if config.model.labels:
        trainable["score"] = params["score"]
    if "prompt" in embed:
        trainable["embed"] = {"prompt": embed.pop("prompt")}
    base = {name: part for name, part in params.items() if name != "score"}
    return BaseAndTrainable({**base, "embed": embed}, trainable)


def prepare_base(config: Config, base: Params) -> Params:
    """The frozen parameters as the step uses them: as they are, or with their matrices in int8."""
    if config.lora.base == "int8" and base:
        return quantize.gates_apart(quantize.inference_params(base, weights="int8"))
    return base


def init_trained(
    config: Config,
    key: Array,
    frozen: Params,
    trainable: Params,
    *,
    mesh: Mesh | None = None,
) -> Params:
    """The parameters that training changes, before the first step.

    All parameters of the model, or adapters on the `frozen` ones merged with the `trainable` ones.
    """
    if not config.lora.on:
        return model_init.init_params(config.model, key, mesh=mesh)
    return lora.merge_trees(lora.init(config.model, config.lora, key, frozen), trainable)


def new_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    frozen: Params,
    trainable: Params,
    *,
    mesh: Mesh | None = None,
) -> TrainState:
    """A function of `train.seed` and the checkpoint's parameters alone."""
    params_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))
    params = init_trained(config, params_key, frozen, trainable, mesh=mesh)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), jax.random.key_data(dropout_key))


def state_from_params(
    optimizer: optax.GradientTransformation, params: Params, rng: Array
) -> TrainState:
    """The state before the first step where all parameters of a checkpoint are trained."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng)
