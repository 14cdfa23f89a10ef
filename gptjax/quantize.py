"""Matrices as decoding reads them: rows [out, in] in float32, bfloat16 or int8, and the product with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax import products
from gptjax.attention import fence

Array = jax.Array


def inputs_of(layer: str) -> int:
    """Leading input axes of a layer's kernel [*in, *out], by its name or path."""
    return 2 if layer.rpartition("/")[2] == "out" else 1


def rows(matrix: Array, dtype: str) -> dict[str, Array]:
    """{"rows": [F, D] in `dtype`}; int8: each row is round(row / scale) with "row_scale" [F] = max |row| / 127, so its error is at most half a scale."""
    if dtype != "int8":
        return {"rows": matrix.astype(dtype)}
    matrix = matrix.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(matrix).max(-1) / 127, 1e-30)
    return {"rows": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "row_scale": scale}


def matrix(weight: Any) -> Array:
    """float32 [F, D] that `rows` stand for."""
    found = weight["rows"].astype(jnp.float32)
    return found * weight["row_scale"][:, None] if "row_scale" in weight else found


@jax.custom_vjp
def times_rows(x: Array, weight: Any) -> Array:
    """x [N, D] times the `rows` [F, D] of a matrix: float32 [N, F].

    On a CPU x is split into two parts of the weights' own type (bfloat16: a number and what its rounding lost; int8: the digits of a 15-bit integer to
    base 256), since XLA is up to ten times slower where types differ (experiments/LOG.md). One row runs down small weights `by_lanes` instead, rounded
    alike, so that a text does not turn on how many rows were fed at once. So activations keep at least 15 bits, and only the weights are rounded.
    The weights are frozen: only x has a gradient."""
    x, rows = jax.lax.optimization_barrier((x, weight["rows"]))  # tied to x, or a loop of decoding would keep converted weights
    product = lambda a, kind: jax.lax.dot_general(a, rows.astype(a.dtype), (((1,), (1,)), ((), ())), preferred_element_type=kind)
    lanes = len(x) == 1 and products.fits_lanes(x.shape[1], rows.dtype)
    if rows.dtype == x.dtype:
        y = fence(product(x, jnp.float32))
    elif jax.default_backend() != "cpu":
        y = product(x.astype(jnp.bfloat16), jnp.float32)
    elif rows.dtype == jnp.int8:
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) / (127 * 256), 1e-30)
        digits = jnp.round(x / scale)
        if lanes:
            y = products.by_lanes(digits, rows[None]) * scale
        else:
            high = jnp.floor((digits + 128) / 256)
            y = fence(product(fence(jnp.concatenate([high, digits - 256 * high]).astype(jnp.int8)), jnp.int32)).astype(jnp.float32)
            y = (256 * y[: len(x)] + y[len(x) :]) * scale
    else:
        high = x.astype(rows.dtype)
        low = (x - high.astype(x.dtype)).astype(rows.dtype)
        if lanes:
            y = products.by_lanes(high.astype(x.dtype) + low.astype(x.dtype), rows[None])
        else:
            y = fence(product(fence(jnp.concatenate([high, low])), jnp.float32))
            y = y[: len(x)] + y[len(x) :]
    return y * weight["row_scale"] if "row_scale" in weight else y


def _forward(x: Array, weight: Any) -> tuple[Array, tuple[Array, Any]]:
    return times_rows(x, weight), (x, weight)


def _backward(saved: tuple[Array, Any], g: Array) -> tuple[Array, Any]:
    x, weight = saved
    nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jax.dtypes.float0 if w.dtype == jnp.int8 else w.dtype), weight)
    return (g @ matrix(weight)).astype(x.dtype), nothing


times_rows.defvjp(_forward, _backward)
