"""The learning rate of a step, and the chain around the optimizer that `optim.name` names.

To add an optimizer or a schedule, see `config/optim_config.py`: it is a function and a row there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from gptjax.config.errors import UserError
from gptjax.config.optim_config import OPTIMIZERS, SCHEDULES, OptimConfig, ParamRules, Rate
from gptjax.config.schema import Config
from gptjax.core import tree
from gptjax.core.types import Params

# Which axes of a stacked kernel are its inputs and which its outputs; None for what is not a
# matrix of a block.
_MATRICES: tuple[tuple[str, MuonDimensionNumbers | None], ...] = (
    (r"blocks/attn/qkv/kernel", MuonDimensionNumbers((1,), (2, 3, 4))),
    (r"blocks/attn/out/kernel", MuonDimensionNumbers((1, 2), (3,))),
    (r"blocks/mlp/(up|down)/kernel", MuonDimensionNumbers((1,), (2,))),
    (r"blocks/mlp/gate_up/kernel", MuonDimensionNumbers((1,), (2, 3))),
    (r".*", None),
)


def make_schedule(config: Config) -> Rate:
    """The learning rate of a step (0-based), float32.

    Linear warmup to the peak at step `warmup_steps` - 1, then the shape of `optim.schedule`.
    """
    optim, steps = config.optim, config.train.steps
    shape = SCHEDULES[optim.schedule]

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        # Never 0: a first step without a change would waste its batch.
        warmup = (step + 1) / max(optim.warmup_steps, 1)
        after_warmup = max(steps - 1 - optim.warmup_steps, 1)
        fraction = jnp.clip((step - optim.warmup_steps) / after_warmup, 0.0, 1.0)
        warming_up = step < optim.warmup_steps
        return optim.lr * jnp.where(warming_up, warmup, shape(optim, fraction))

    return rate


def make_optimizer(config: Config, params: Params) -> optax.GradientTransformation:
    """Clips by the global norm, then the optimizer; frozen parameters get no update.

    params: arrays or shapes. Raises UserError for patterns that match no parameter.
    """
    optim = config.optim
    _check_patterns("no_decay", optim.no_decay, params)
    _check_patterns("freeze", optim.freeze, params)
    decays = tree.map_with_path(lambda path, _: not tree.matches(optim.no_decay, path), params)
    trained = tree.map_with_path(lambda path, _: not tree.matches(optim.freeze, path), params)
    if not any(jax.tree.leaves(trained)):
        raise UserError(
            f"optim.freeze = {list(optim.freeze)} freezes every parameter: nothing is left to train"
        )
    parts = []
    if optim.max_grad_norm:
        parts.append(optax.clip_by_global_norm(optim.max_grad_norm))
    rules = ParamRules(decays, _matrix_axes)
    parts.append(OPTIMIZERS[optim.name](optim, make_schedule(config), rules))
    if optim.layerwise_lr_decay < 1:
        parts.append(layerwise_lr_decay(optim.layerwise_lr_decay, config.model.layers))
    chain = optax.chain(*parts)
    if all(jax.tree.leaves(trained)):
        return chain
    # Frozen parameters have no moments, no decay, and no part in the norm that clips.
    return optax.partition({True: chain, False: optax.set_to_zero()}, trained)


def _check_patterns(name: str, patterns: tuple[str, ...], params: Params) -> None:
    """Raises UserError for a pattern that matches no parameter, unless it is a default."""
    defaults = OptimConfig().no_decay if name == "no_decay" else ()
    for pattern in tree.unmatched_patterns(patterns, params):
        if pattern not in defaults:
            paths = ", ".join(list(tree.flatten(params))[:4])
            raise UserError(
                f"optim.{name} = {list(patterns)}: {pattern!r} matches no parameter; paths look "
                f"like {paths}"
            )


def _matrix_axes(params: Params) -> Params:
    return tree.map_with_path(lambda path, _: tree.first_match(_MATRICES, path), params)


def layerwise_lr_decay(ratio: float, layers: int) -> optax.GradientTransformation:
    """Smaller steps for lower layers (Howard & Ruder 2018).

    Multiplies updates of layer l (0 lowest) by ratio^(layers - 1 - l), of embeddings by
    ratio^layers.
    """

    def scale(path: str, update: jax.Array) -> jax.Array:
        if path.startswith("blocks/"):
            factors = ratio ** jnp.arange(layers - 1, -1, -1, dtype=jnp.float32)
            return update * factors.reshape(-1, *[1] * (update.ndim - 1)).astype(update.dtype)
        return update * ratio**layers if path.startswith("embed/") else update

    return optax.stateless(lambda updates, params: tree.map_with_path(scale, updates))
