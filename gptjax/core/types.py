"""Types that several folders share: arrays, parameters, a batch, the state of a training run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

Array = jax.Array
Params = dict[str, Any]  # nested dicts of arrays, blocks stacked on axis 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "targets",
        "loss_weights",
        "segment_ids",
        "positions",
        "reference",
        "advantages",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step trains on: arrays [B, T], or [T] for one row of a batch. A pytree.

    It is made of NumPy arrays by `data/` and of JAX arrays after `runtime.sharding.to_global`.
    """

    tokens: Any  # int32: what the model reads
    targets: Any  # int32: what it should say at each position; a float for a regression
    loss_weights: Any  # float32: 0 where a position does not count
    segment_ids: Any  # int32: positions attend only within their segment; 0 = padding
    positions: Any  # int32: position within the segment, from 0
    reference: Any = None  # float32, preference and grpo: log-probabilities of a frozen model
    advantages: Any = None  # float32, grpo: the advantage of the row's answer, at each position


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "rng"],
    meta_fields=[],
)
@dataclasses.dataclass
class TrainState:
    """All that a step of training changes, a pytree. With adapters, params are those alone."""

    step: Array  # int32, steps done
    params: Params  # float32
    opt_state: Any  # of the optimizer's transformation
    rng: Array  # uint32, key data: the root of all dropout
