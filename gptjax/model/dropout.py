"""Dropout whose masks are functions of (key, row, position), the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops import collectives


def keys_of_places(key: Array, rows: int, length: int, *axes: str) -> Array:
    """A key for each of this device's rows and positions, [rows, length].

    axes: of the mesh that split the sequence, the outer one first.
    """
    row = (collectives.index("data") * collectives.size("fsdp") + collectives.index("fsdp")) * rows
    slot: Any = 0
    for axis in axes:
        slot = slot * collectives.size(axis) + collectives.index(axis)
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    of_rows = fold_in(key, row + jnp.arange(rows))
    return jax.vmap(fold_in, (0, None))(of_rows, slot * length + jnp.arange(length))


def drop_features(key: Array, x_BTD: Array, rate: float, *axes: str) -> Array:
    """x / (1 - rate) where it is kept, else 0; axes as in `keys_of_places`."""
    keys_BT = keys_of_places(key, x_BTD.shape[0], x_BTD.shape[1], *axes)
    keep = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x_BTD.shape[2:])))
    return jnp.where(keep(keys_BT), x_BTD / (1 - rate), jnp.zeros_like(x_BTD))


def keep_inputs(key: Array, x: Array, inputs: int, keep_prob: Array, *, split: bool) -> Array:
    """bool like x, whose last `inputs` axes enter a product; split: over `tensor`, the first of
    them."""
    shape = list(x.shape[2:])
    if split:
        shape[-inputs] *= collectives.size("tensor")
    keys_BT = keys_of_places(key, x.shape[0], x.shape[1], "context")
    keep = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, keep_prob, tuple(shape))))(keys_BT)
    return collectives.part(keep, "tensor", x.ndim - inputs) if split else keep


def weights_multiplier(key: Array, shape: tuple[int, ...], rate: float) -> Array:
    """What multiplies attention weights [B, K, G, T, S]: 0, or 1 / (1 - rate)."""
    rows, heads, groups, length, keys = shape
    first = collectives.index("tensor") * heads * groups
    numbers = first + jnp.arange(heads * groups).reshape(heads, groups)
    fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))
    of_heads = fold_in(key, numbers)
    keys_KGBT = jax.vmap(jax.vmap(lambda k: keys_of_places(k, rows, length, "context")))(of_heads)
    of_weights = lambda k: jax.random.bernoulli(k, 1 - rate, (keys,))
    keep = jax.vmap(jax.vmap(jax.vmap(jax.vmap(of_weights))))(jnp.moveaxis(keys_KGBT, 2, 0))
    return keep / jnp.float32(1 - rate)
