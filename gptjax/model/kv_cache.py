"""The key/value cache of generation: made here, written and read by `ops.attention.cache`.

A cache is a tuple of layers or, where `model.scan_layers` is on, the dict of a layer with all
layers on axis 0 of its arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.ops import collectives
from gptjax.ops.attention.cache import PLACES

Cache = tuple[Params, ...] | Params


def init_cache(config: ModelConfig, batch: int, length: int, *, dtype: str = "") -> Cache:
    """Zeros for each layer: {"k": [B * K, length, C], "v": [B * K, C, length]}, of K key/value
    heads those of this device.

    dtype: float32, bfloat16 or int8 (default: the compute dtype); int8 adds {"k_scale", "v_scale"}:
    float32 [B * K, length]. Both products of attention contract the last axis, so that they need
    neither a transpose nor a reshape, which XLA:CPU would pay for with copies.
    """
    heads = batch * (config.kv // collectives.size("tensor"))
    width, dtype = config.head_width, dtype or config.dtype

    def zeros(*layers: int) -> Params:
        cache = {
            "k": jnp.zeros((*layers, heads, length, width), dtype),
            "v": jnp.zeros((*layers, heads, width, length), dtype),
        }
        if dtype == "int8":
            cache |= {n: jnp.zeros((*layers, heads, length)) for n in ("k_scale", "v_scale")}
        return cache

    if config.scan_layers is True:
        return zeros(config.layers)
    return tuple(zeros() for _ in range(config.layers))


def rows_of(cache: Cache, row: Array, used: Array) -> Cache:
    """A cache for calls about the texts from `row` on, of which `used` slots each are used."""
    if isinstance(cache, dict):
        return cache | {"row": row, "used": used}
    return tuple(layer | {"row": row, "used": used} for layer in cache)


def whole(cache: Any) -> Any:
    """The opposite of `rows_of`."""
    if isinstance(cache, dict):
        return {name: x for name, x in cache.items() if name not in PLACES}
    return tuple(map(whole, cache))


def joined(cache: Params) -> Params:
    """The arrays of a cache of all layers as those of one layer with L * B rows."""
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in whole(cache).items()}


def apart(arrays: Params, layers: int) -> Params:
    """The opposite of `joined`."""
    return {name: x.reshape(layers, -1, *x.shape[1:]) for name, x in arrays.items()}


def take_rows(cache: Cache, rows: Array, batch: int) -> Cache:
    """The cache of a batch that is made of these rows of the cache of `batch` rows."""
    axis = int(isinstance(cache, dict))

    def take(array: Array) -> Array:
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        by_row = array.reshape(*before, batch, -1, *after)
        taken = by_row[:, rows] if before else by_row[rows]
        return taken.reshape(*before, -1, *after)

    return jax.tree.map(take, cache)
