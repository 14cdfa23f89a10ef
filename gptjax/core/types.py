"""Types that several folders share: arrays, parameters, a batch, the state of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
Params = dict[str, Any]  # nested dicts of arrays, blocks stacked on axis 0

# Sees a value of the forward pass and gives what takes its place: hook(name, value, layer); a pure
# function (`model.transformer.HOOK_POINTS` has the names).
Hook = Callable[[str, Array, int], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The input of one step: arrays [B, T], or [T] for one row of a batch. A pytree.

    `data/` makes it of NumPy arrays, and `runtime.sharding.to_global` of JAX arrays.
    """

    tokens: Any  # int32: the input of the model
    targets: Any  # int32: the token (or class) to predict; float32: the number to predict
    loss_weights: Any  # float32: 0 where a position does not count
    segment_ids: Any  # int32: a position attends only within its segment; 0 = padding
    positions: Any  # int32: position within the segment, from 0
    reference: Any = None  # float32, preference and grpo: log-probabilities of a frozen model
    advantages: Any = None  # float32, grpo: the advantage of the row's answer, at each position


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step of training changes, a pytree. With adapters, params are those alone."""

    step: Array  # int32, steps done
    params: Params  # float32
    opt_state: Any  # of the optimizer's transformation
    rng: Array  # uint32, key data: the root of all dropout
