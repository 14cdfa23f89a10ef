"""Schedules and the optimizer chain. To add a schedule, add a row to SCHEDULES; an optimizer, a row to OPTIMIZERS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from gptjax.config.errors import UserError
from gptjax.config.schema import Config, OptimConfig
from gptjax.core import tree

Schedule = Callable[[Any], Any]  # step (0-based) -> learning rate


def make_schedule(config: Config) -> Schedule:
    """Learning rate of step s (0-based): linear warmup to the peak at s = warmup_steps - 1, then the chosen shape."""
    o, steps = config.optim, config.train.steps
    shape = SCHEDULES[o.schedule]

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / max(
            o.warmup_steps, 1
        )  # never 0: a first step without a change would waste its batch
        share = jnp.clip((step - o.warmup_steps) / max(steps - 1 - o.warmup_steps, 1), 0.0, 1.0)
        return o.lr * jnp.where(step < o.warmup_steps, warm, shape(o, share))

    return rate


SCHEDULES: dict[str, Callable[[OptimConfig, Any], Any]] = {
    "cosine": lambda o, share: (
        o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * share))
    ),
    "linear": lambda o, share: 1 - (1 - o.min_lr_ratio) * share,
    "wsd": lambda o, share: (
        1
        - (1 - o.min_lr_ratio)
        * jnp.clip((share - 1 + o.decay_fraction) / max(o.decay_fraction, 1e-9), 0.0, 1.0)
    ),
    "constant": lambda o, share: jnp.ones_like(share),
}


def _adamw(o: OptimConfig, rate: Callable[[Any], Any], decays: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decays)


def _muon(o: OptimConfig, rate: Callable[[Any], Any], decays: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the matrices of the blocks, Adam on embeddings and vectors. Same schedule, two peaks."""
    return optax.contrib.muon(
        lambda step: rate(step) * (o.muon_lr / o.lr),
        weight_decay=o.weight_decay,
        weight_decay_mask=decays,
        adam_b1=o.b1,
        adam_b2=o.b2,
        adam_learning_rate=rate,
        muon_weight_dimension_numbers=lambda params: tree.map_with_path(
            lambda path, _: tree.first_match(_MATRICES, path), params
        ),
    )


# Which axes of a stacked kernel are its inputs and which its outputs; what is no matrix of a block is left to Adam.
_MATRICES: tuple[tuple[str, MuonDimensionNumbers | None], ...] = (
    (r"blocks/attn/qkv/kernel", MuonDimensionNumbers((1,), (2, 3, 4))),
    (r"blocks/attn/out/kernel", MuonDimensionNumbers((1, 2), (3,))),
    (r"blocks/mlp/(up|down)/kernel", MuonDimensionNumbers((1,), (2,))),
    (r"blocks/mlp/gate_up/kernel", MuonDimensionNumbers((1,), (2, 3))),
    (r".*", None),
)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def layer_decay(share: float, layers: int) -> optax.GradientTransformation:
    """Updates of layer l (0 lowest) times share^(layers - 1 - l), of embeddings times share^layers (Howard & Ruder 2018)."""

    def scale(path: str, update: Any) -> Any:
        if path.startswith("blocks/"):
            rates = share ** jnp.arange(layers - 1, -1, -1, dtype=jnp.float32)
            return update * rates.reshape(-1, *[1] * (update.ndim - 1)).astype(update.dtype)
        return update * share**layers if path.startswith("embed/") else update

    return optax.stateless(lambda updates, params: tree.map_with_path(scale, updates))


def make_optimizer(config: Config, params: Any) -> optax.GradientTransformation:
    """Clip by the global norm, then the optimizer, then nothing for frozen parameters. Patterns that match no path are refused.

    `params` may be shapes (`jax.eval_shape`).
    """
    o = config.optim
    for name, patterns in (("no_decay", o.no_decay), ("freeze", o.freeze)):
        missing = [
            p
            for p in tree.unmatched_patterns(patterns, params)
            if not (name == "no_decay" and p in OptimConfig().no_decay)
        ]
        if missing:
            some = ", ".join(list(tree.flatten(params))[:4])
            raise UserError(
                f"optim.{name} = {list(patterns)}: {missing[0]!r} matches no parameter; paths look like {some}"
            )
    decays = tree.map_with_path(lambda path, _: not tree.matches(o.no_decay, path), params)
    trained = tree.map_with_path(lambda path, _: not tree.matches(o.freeze, path), params)
    if not any(tree.flatten(trained).values()):
        raise UserError(
            f"optim.freeze = {list(o.freeze)} freezes every parameter: nothing is left to train"
        )
    parts = [optax.clip_by_global_norm(o.max_grad_norm)] if o.max_grad_norm else []
    ends = (
        [layer_decay(o.layerwise_lr_decay, config.model.layers)] if o.layerwise_lr_decay < 1 else []
    )
    chain = optax.chain(*parts, OPTIMIZERS[o.name](o, make_schedule(config), decays), *ends)
    if all(tree.flatten(trained).values()):
        return chain
    # frozen parameters get no moments, take no part in the clip norm and no decay
    return optax.partition({True: chain, False: optax.set_to_zero()}, trained)
