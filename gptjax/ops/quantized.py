"""Matrices as decoding reads them, rows [out, in] in float32, bfloat16 or int8; and products.

A weight is {"rows": [F, D]}, with "row_scale" [F] where it is int8. With "layer" (int32 []) its
rows are [L, F, D], those of all layers, of which the products read one where it lies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from gptjax.ops.materialize import Barrier, materialize, unchanged
from gptjax.ops.products import FEW, Part, small_batch_matmul

_PASSES = 8  # over small weights, before converting them pays


def quantize_rows(matrix: Float[Array, "F D"], dtype: str) -> dict[str, Array]:
    """{"rows": [F, D] in `dtype`} of a matrix [F, D].

    int8: each row is round(row / scale) with "row_scale" [F] = max |row| / 127, so its error is at
    most half a scale.
    """
    if dtype != "int8":
        return {"rows": matrix.astype(dtype)}
    matrix = matrix.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(matrix).max(-1) / 127, 1e-30)
    return {"rows": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "row_scale": scale}


def dequantize(weight: Any) -> Float32[Array, "F D"]:
    """float32 [F, D] that `rows` stand for."""
    matrix = _own_rows(weight).astype(jnp.float32)
    return matrix * weight["row_scale"][:, None] if "row_scale" in weight else matrix


def lookup(
    weight: Any, ids: Int[Array, "*S"], *, barrier: Barrier = unchanged
) -> Float32[Array, "*S D"]:
    """float32 [..., D]: the rows of these ids."""
    x = barrier(weight["rows"][ids]).astype(jnp.float32)
    return x * weight["row_scale"][ids][..., None] if "row_scale" in weight else x


def matmul(x: Float[Array, "N D"], weight: Any) -> Float32[Array, "N F"]:
    """x [N, D] times the `rows` [F, D] of a matrix: float32 [N, F]. The definition."""
    return x.astype(jnp.float32) @ dequantize(weight).T


@jax.custom_vjp
def matmul_accelerator(x: Float[Array, "N D"], weight: Any) -> Float32[Array, "N F"]:
    """The same with small weights as they are; x is rounded to bfloat16 with them."""
    if weight["rows"].dtype != x.dtype:
        x, weight = _tied(x, weight)
        x = x.astype(jnp.bfloat16)
    rows = _own_rows(weight).astype(x.dtype)
    return _scaled(_rows_product(x, rows), weight)


@jax.custom_vjp
def matmul_cpu(x: Float[Array, "N D"], weight: Any) -> Float32[Array, "N F"]:
    """The same on a CPU, where only the weights are rounded.

    For a few rows of x, passes over small weights beat converting the weights (up to `_PASSES`;
    measured in experiments/LOG.md).
    """
    x, weight = _tied(x, weight)
    if len(x) <= FEW * (1 if weight["rows"].dtype == x.dtype else _PASSES):
        y = _by_passes(x, weight)
    else:
        rows = _own_rows(weight)
        dtype = jnp.promote_types(x.dtype, rows.dtype)
        x, rows = x.astype(dtype), materialize(rows.astype(dtype))
        # the right operand is packed anew in every call: let it be the smaller one
        if len(x) < 64:
            y = materialize(_rows_product(rows, x)).T
        else:
            y = materialize(_rows_product(x, rows))
    return _scaled(y, weight)


def matmul_in_order(x: Float[Array, "N D"], weight: Any) -> Float32[Array, "N F"]:
    """`matmul_cpu` for decoding: the sums of a row of x have one order, whatever N is."""
    return _scaled(_by_passes(*_tied(x, weight)), weight)


def _own_rows(weight: Any) -> Array:
    """[F, D]."""
    rows = weight["rows"]
    if "layer" not in weight:
        return rows
    return jax.lax.dynamic_index_in_dim(rows, weight["layer"], keepdims=False)


def _by_passes(x: Array, weight: Any) -> Array:
    """x [N, D] -> float32 [N, F]: a pass over the rows for each `FEW` rows of x."""
    rows, own = weight["rows"], Part(weight.get("layer", 0))
    rows = rows if "layer" in weight else rows[None]
    parts = [x[None, i : i + FEW] for i in range(0, len(x), FEW)]
    return jnp.concatenate([small_batch_matmul(part, rows, own)[0] for part in parts])


def _tied(x: Array, weight: Any) -> tuple[Array, Any]:
    """x and the weight, its rows computed with x: a loop of decoding would keep converted ones."""
    x, rows = jax.lax.optimization_barrier((x, weight["rows"]))
    return x, {**weight, "rows": rows}


def _rows_product(a: Array, b: Array) -> Array:
    """a [N, D], b [F, D] -> float32 [N, F]."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _scaled(y: Array, weight: Any) -> Array:
    return y * weight["row_scale"] if "row_scale" in weight else y


def _backward(saved: tuple[Array, Any], g: Array) -> tuple[Array, Any]:
    """The weights are frozen: only x has a gradient."""
    x, weight = saved

    def no_gradient(w: Array) -> Array:
        is_integer = jnp.issubdtype(w.dtype, jnp.integer)
        return jnp.zeros(w.shape, jax.dtypes.float0 if is_integer else w.dtype)

    return (g @ dequantize(weight)).astype(x.dtype), jax.tree.map(no_gradient, weight)


matmul_accelerator.defvjp(lambda x, w: (matmul_accelerator(x, w), (x, w)), _backward)
matmul_cpu.defvjp(lambda x, w: (matmul_cpu(x, w), (x, w)), _backward)
