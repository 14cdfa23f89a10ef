"""The key/value cache of generation: made here, written and read by `ops.attention.cache`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.ops import collectives


def init_cache(
    config: ModelConfig, batch: int, length: int, *, dtype: str = ""
) -> tuple[Params, ...]:
    """Zeros for each layer: {"k": [B * K, length, C], "v": [B * K, C, length]}, of K key/value
    heads those of this device.

    dtype: float32, bfloat16 or int8 (default: the compute dtype); int8 adds {"k_scale", "v_scale"}:
    float32 [B * K, length]. Both products of attention contract the last axis, so that they need
    neither a transpose nor a reshape, which XLA:CPU would pay for with copies.
    """
    heads = batch * (config.kv // collectives.size("tensor"))
    width, dtype = config.head_width, dtype or config.dtype

    def layer() -> Params:
        cache = {
            "k": jnp.zeros((heads, length, width), dtype),
            "v": jnp.zeros((heads, width, length), dtype),
        }
        if dtype == "int8":
            cache |= {name: jnp.zeros((heads, length)) for name in ("k_scale", "v_scale")}
        return cache

    return tuple(layer() for _ in range(config.layers))


def take_rows(cache: tuple[Params, ...], rows: Array, batch: int) -> tuple[Params, ...]:
    """The cache of a batch that is made of these rows of the cache of `batch` rows."""

    def take(array: Array) -> Array:
        by_row = array.reshape(batch, -1, *array.shape[1:])
        return by_row[rows].reshape(-1, *array.shape[1:])

    return jax.tree.map(take, cache)
