"""TODO docstring."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params


def init_cache(
    config: ModelConfig, batch: int, length: int, *, dtype: str = ""
) -> tuple[Params, ...]:
    """For each layer zeros {"k": [B * K, length, C], "v": [B * K, C, length]} in `dtype` (default: the compute dtype): both products contract the
    last axis and need neither a transpose nor a reshape, which XLA:CPU would pay for with copies; int8 adds {"k_scale", "v_scale"}: float32 [B * K, length]."""
    heads, width, kind = batch * config.kv, config.head_width, dtype or config.dtype
    shapes = {"k": (heads, length, width), "v": (heads, width, length)}
    scales = {"k_scale": (heads, length), "v_scale": (heads, length)} if kind == "int8" else {}
    one = lambda: {
        **{n: jnp.zeros(s, kind) for n, s in shapes.items()},
        **{n: jnp.zeros(s) for n, s in scales.items()},
    }
    return tuple(one() for _ in range(config.layers))


def take_rows(cache: tuple[Params, ...], rows: Array, batch: int) -> tuple[Params, ...]:
    """The cache of a batch made of these rows of the cache of `batch` rows."""
    return jax.tree.map(
        lambda a: a.reshape(batch, -1, *a.shape[1:])[rows].reshape(-1, *a.shape[1:]), cache
    )
