"""Optimizers and learning-rate schedules: what each does, and its settings.

To add an optimizer: write a function like `lion`, add a row to OPTIMIZERS, and declare its own
settings, named after it, in OptimConfig. To add a schedule: the same with `cosine` and SCHEDULES.
Nothing outside this file names them. `training/optim.py` adds what all share: warmup, clipping,
frozen parameters.

JAX and Optax are imported inside the functions, because a config is read without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptjax.config.setting import setting

if TYPE_CHECKING:
    import jax
    import optax

Rate = Callable[[Any], Any]  # step (0-based) -> learning rate


@dataclasses.dataclass(frozen=True)
class ParamRules:
    """What an optimizer may ask about the parameters."""

    decays: Any  # tree of bool: whether a parameter has weight decay
    matrix_axes: Callable[[Any], Any]
    """params -> tree of optax.contrib.MuonDimensionNumbers, None for what is not a matrix."""


# Schedules: the learning rate divided by its peak, at a fraction in [0, 1] (float32) of the steps
# after the warmup.


def cosine(o: OptimConfig, fraction: jax.Array) -> jax.Array:
    """Half a period of a cosine (Loshchilov & Hutter 2017), without restarts."""
    import jax.numpy as jnp

    return o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))


def linear(o: OptimConfig, fraction: jax.Array) -> jax.Array:
    return 1 - (1 - o.min_lr_ratio) * fraction


def wsd(o: OptimConfig, fraction: jax.Array) -> jax.Array:
    """Warmup, stable, decay (Hu et al. 2024): constant, then linear in the last steps."""
    import jax.numpy as jnp

    decayed = (fraction - 1 + o.decay_fraction) / max(o.decay_fraction, 1e-9)
    return 1 - (1 - o.min_lr_ratio) * jnp.clip(decayed, 0.0, 1.0)


def constant(o: OptimConfig, fraction: jax.Array) -> jax.Array:
    import jax.numpy as jnp

    return jnp.ones_like(fraction)


SCHEDULES: dict[str, Callable[[OptimConfig, Any], Any]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


def adamw(o: OptimConfig, rate: Rate, rules: ParamRules) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019). State: two moments."""
    import optax

    return optax.adamw(
        rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=rules.decays
    )


def muon(o: OptimConfig, rate: Rate, rules: ParamRules) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, Adam for embeddings and vectors.

    Both follow the same schedule, each with its own peak. State: one moment of a matrix.
    """
    import optax.contrib

    return optax.contrib.muon(
        lambda step: rate(step) * (o.muon_lr / o.lr),
        weight_decay=o.weight_decay,
        weight_decay_mask=rules.decays,
        adam_b1=o.b1,
        adam_b2=o.b2,
        adam_learning_rate=rate,
        muon_weight_dimension_numbers=rules.matrix_axes,
    )


def lion(o: OptimConfig, rate: Rate, rules: ParamRules) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023): the sign of an interpolation of gradient and moment.

    State: one moment. Every update has the size of the learning rate, so take an `optim.lr` 3 to
    10 times smaller than Adam's, and an `optim.weight_decay` as many times larger.
    """
    import optax

    return optax.lion(
        rate, b1=o.lion_b1, b2=o.lion_b2, weight_decay=o.weight_decay, mask=rules.decays
    )


def adafactor(o: OptimConfig, rate: Rate, rules: ParamRules) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018): second moments of a matrix as a row and a column.

    State: two vectors for the two longest axes of a parameter, and no first moment unless
    `optim.adafactor_momentum` is set. The update of a parameter is relative to its root mean
    square, so `optim.lr` is too: 0.01 changes it by about 1 % a step. A kernel of the blocks is one
    parameter for all layers. Weight decay is decoupled and follows the schedule, as AdamW's.
    """
    import optax

    update = optax.adafactor(
        rate,
        min_dim_size_to_factor=o.adafactor_min_dim_size_to_factor,
        decay_rate=o.adafactor_decay_rate,
        clipping_threshold=o.adafactor_clipping_threshold,
        momentum=o.adafactor_momentum or None,
    )
    if not o.weight_decay:
        return update
    decay = optax.add_decayed_weights(lambda step: -rate(step) * o.weight_decay, mask=rules.decays)
    return optax.chain(update, decay)


OPTIMIZERS: dict[str, Callable[[OptimConfig, Rate, ParamRules], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "adafactor": adafactor,
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = setting(
        "adamw",
        "Optimizer; muon uses Muon for the matrices of the blocks and Adam for the rest.",
        choices=tuple(OPTIMIZERS),
    )
    lr: float = setting(1e-3, "Peak learning rate.", low=1e-12)
    muon_lr: float = setting(0.02, "muon: peak learning rate of the matrices.", low=0.0)
    schedule: str = setting(
        "cosine",
        "Shape of the learning rate after the warmup; wsd is constant, then falls to the end.",
        choices=tuple(SCHEDULES),
    )
    warmup_steps: int = setting(100, "Steps of linear warmup.", low=0)
    min_lr_ratio: float = setting(0.1, "Last learning rate divided by the peak.", low=0.0, high=1.0)
    decay_fraction: float = setting(
        0.2, "wsd: fraction of the steps after the warmup that decay.", low=0.0, high=1.0
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay.", low=0.0)
    b1: float = setting(0.9, "adamw, muon: decay rate of the first moment.", low=0.0, high=0.9999)
    b2: float = setting(
        0.95, "adamw, muon: decay rate of the second moment.", low=0.0, high=0.999999
    )
    eps: float = setting(1e-8, "adamw: epsilon of Adam.", low=1e-20)
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this global norm; 0 = off.", low=0.0
    )
    no_decay: tuple[str, ...] = setting(
        (".*/bias", ".*/scale"),
        "Patterns (regular expressions) of the paths of parameters without weight decay.",
    )
    freeze: tuple[str, ...] = setting(
        (), "Patterns (regular expressions) of the paths of parameters that are not trained."
    )
    layerwise_lr_decay: float = setting(
        1.0,
        "Learning rate of each layer divided by that of the layer above it; the head has the full "
        "rate.",
        low=0.01,
        high=1.0,
    )
    lion_b1: float = setting(0.9, "lion: weight of the moment in the update.", low=0.0, high=0.9999)
    lion_b2: float = setting(0.99, "lion: decay rate of the moment.", low=0.0, high=0.999999)
    adafactor_min_dim_size_to_factor: int = setting(
        128, "adafactor: second moments are factored where two axes are at least this long.", low=1
    )
    adafactor_decay_rate: float = setting(
        0.8,
        "adafactor: c, where the second moments decay by 1 - step^(-c).",
        low=0.01,
        high=1.0,
    )
    adafactor_clipping_threshold: float = setting(
        1.0, "adafactor: an update is scaled down to this root mean square.", low=1.0
    )
    adafactor_momentum: float = setting(
        0.0, "adafactor: decay rate of the first moment; 0 = none is kept.", low=0.0, high=0.9999
    )
