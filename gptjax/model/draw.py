"""Parts of one long draw of random numbers: each device draws the numbers that it holds, alone.

`jax.random.normal(key, (rows, width))` gives number i by hashing the key with i (Salmon et al.
2011), so any part of it can be had without the rest. That keeps a model's random start and its
dropout the same on every mesh without ever holding a whole array of them on one device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P

from gptjax.core.types import Array
from gptjax.ops import collectives


class Piece(NamedTuple):
    """Numbers [start, start + size of shape) of the draw, as an array split by `spec`."""

    start: int
    shape: tuple[int, ...]
    spec: P


def own_parts(key: Array, pieces: list[Piece]) -> list[Array]:
    """This device's part of each piece, float32, bit for bit those of `jax.random.normal`."""
    counters = [_own_counters(piece) for piece in pieces]
    shapes = [high.shape for high, _ in counters]
    high, low = (jnp.concatenate([pair[i].ravel() for pair in counters]) for i in (0, 1))
    numbers = _normals(key, high, low)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = jnp.split(numbers, ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def own_uniform(key: Array, shape: tuple[int, ...], spec: P) -> Array:
    """This device's part of `jax.random.uniform(key, shape)`, bit for bit, split by `spec`."""
    return _uniform(key, *_own_counters(Piece(0, shape, spec)))


def _own_counters(piece: Piece) -> tuple[Array, Array]:
    """The places in the draw, as their upper and lower 32 bits."""
    start, shape, spec = piece
    count = len(shape)
    high = low = jnp.zeros((1,) * count, jnp.uint32)
    for dim, length in enumerate(shape):
        stride = math.prod(shape[dim + 1 :])
        offsets = np.arange(length, dtype=np.uint64) * np.uint64(stride)
        if not dim:
            offsets += np.uint64(start)
        own = [jnp.asarray((offsets >> np.uint64(32)).astype(np.uint32))]
        own += [jnp.asarray(offsets.astype(np.uint32))]
        axes = spec[dim] if dim < len(spec) else None
        for axis in axes if isinstance(axes, tuple) else (axes,):
            own = [collectives.part(x, axis, 0) if axis else x for x in own]
        more_high, more_low = (
            jnp.expand_dims(x, tuple(d for d in range(count) if d != dim)) for x in own
        )
        low = low + more_low
        high = high + more_high + (low < more_low)  # the carry
    return jnp.broadcast_arrays(high, low)  # type: ignore[return-value]


def _uniform(key: Array, high: Array, low: Array) -> Array:
    """What `jax.random.uniform` makes of the bits at these places: numbers in [0, 1)."""
    first, second = jax.random.key_data(key)
    upper, lower = threefry2x32_p.bind(first, second, high, low)
    bits = (upper ^ lower) >> 9 | np.float32(1).view(np.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1


def _normals(key: Array, high: Array, low: Array) -> Array:
    """What `jax.random.normal` makes of the bits at these places."""
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, _uniform(key, high, low) * (1 - least) + least)
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)
