"""Types that several folders share: arrays, parameters, the state of a training run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

Array = jax.Array
Params = dict[str, Any]  # nested dicts of arrays, blocks stacked on axis 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "rng"],
    meta_fields=[],
)
@dataclasses.dataclass
class TrainState:
    """step: int32, steps done. rng: key data (uint32), the root of all dropout."""

    step: Array
    params: Any
    opt_state: Any
    rng: Array
