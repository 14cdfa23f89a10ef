"""Dropout whose masks do not depend on the mesh: each device draws its part of the whole mask."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.core.types import Array
from gptjax.model.draw import own_uniform
from gptjax.ops import collectives
from gptjax.runtime.sharding import BATCH

ROWS = BATCH[0]  # axes of the mesh that split the rows of a batch
RESIDUAL = P(ROWS, ("context", "tensor"), None)  # of the residual stream [B, T, D]


class Dropout(nn.Module):
    """x / (1 - rate) where it is kept, else 0, for x [B, T, D] of the residual stream."""

    rate: float

    def __call__(self, x_BTD: Array) -> Array:
        if not self.rate:
            return x_BTD
        keep_prob = 1 - self.rate
        keep = keep_mask(self.make_rng("dropout"), keep_prob, x_BTD.shape, RESIDUAL)
        return jnp.where(keep, x_BTD / keep_prob, jnp.zeros_like(x_BTD))


def keep_mask(key: Array, keep_prob: Array | float, own_shape: tuple[int, ...], spec: P) -> Array:
    """bool [own_shape], True with probability `keep_prob`: this device's part of
    `jax.random.bernoulli` on the shape of all devices together, which is split by `spec`."""
    counts = [_devices(axes) for axes in spec]
    if math.prod(counts) == 1:
        return jax.random.bernoulli(key, keep_prob, own_shape)
    whole = [size * count for size, count in zip(own_shape, counts, strict=True)]
    return own_uniform(key, tuple(whole), spec) < keep_prob


def _devices(axes: str | tuple[str, ...] | None) -> int:
    """Devices along the axes of the mesh that split a dimension."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(collectives.size(name) for name in names if name)
