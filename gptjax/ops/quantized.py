"""TODO docstring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops import products
from gptjax.ops.materialize import materialize

_PASSES = 8  # over small weights, before converting them pays


def quantize_rows(matrix: Array, dtype: str) -> dict[str, Array]:
    """{"rows": [F, D] in `dtype`}; int8: each row is round(row / scale) with "row_scale" [F] = max |row| / 127, so its error is at most half a scale."""
    if dtype != "int8":
        return {"rows": matrix.astype(dtype)}
    matrix = matrix.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(matrix).max(-1) / 127, 1e-30)
    return {"rows": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "row_scale": scale}


def dequantize(weight: Any) -> Array:
    """float32 [F, D] that `rows` stand for."""
    found = weight["rows"].astype(jnp.float32)
    return found * weight["row_scale"][:, None] if "row_scale" in weight else found


@jax.custom_vjp
def quantized_matmul(x: Array, weight: Any) -> Array:
    """x [N, D] times the `rows` [F, D] of a matrix: float32 [N, F].

    Only the weights are rounded (accelerators round x to bfloat16 too). On a CPU, passes over small weights for a few rows of x each beat converting
    the weights (up to `_PASSES`; measured in experiments/LOG.md). The weights are frozen: only x has a gradient."""
    x, rows = jax.lax.optimization_barrier(
        (x, weight["rows"])
    )  # tied to x, or a loop of decoding would keep converted weights
    product = lambda a, b: jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if jax.default_backend() != "cpu":
        y = product(
            *(
                [x, rows]
                if rows.dtype == x.dtype
                else [x.astype(jnp.bfloat16), rows.astype(jnp.bfloat16)]
            )
        )
    elif len(x) <= products.FEW * (1 if rows.dtype == x.dtype else _PASSES):
        y = jnp.concatenate(
            [
                products.small_batch_matmul(x[None, i : i + products.FEW], rows[None])[0]
                for i in range(0, len(x), products.FEW)
            ]
        )
    else:
        kind = jnp.promote_types(x.dtype, rows.dtype)
        x, rows = x.astype(kind), materialize(rows.astype(kind))
        y = (
            materialize(product(rows, x)).T if len(x) < 64 else materialize(product(x, rows))
        )  # the right one is packed anew in every call
    return y * weight["row_scale"] if "row_scale" in weight else y


def _forward(x: Array, weight: Any) -> tuple[Array, tuple[Array, Any]]:
    return quantized_matmul(x, weight), (x, weight)


def _backward(saved: tuple[Array, Any], g: Array) -> tuple[Array, Any]:
    x, weight = saved
    nothing = jax.tree.map(
        lambda w: jnp.zeros(w.shape, jax.dtypes.float0 if w.dtype == jnp.int8 else w.dtype), weight
    )
    return (g @ dequantize(weight)).astype(x.dtype), nothing


quantized_matmul.defvjp(_forward, _backward)
