"""Matrices as decoding reads them: rows [out, in] in float32, bfloat16 or int8, and the product with them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import products, tree
from gptjax.attention import fence

Array = jax.Array
_PASSES = 8  # over small weights, before converting them pays


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


def inference_block(block: dict[str, Any], *, weights: str = "float32") -> dict[str, Any]:
    """One block, or any other module, as decoding reads it: each matrix as `rows` in `weights`: float32, bfloat16 or int8. A product with
    one vector reads every weight once, so their bytes are the time it takes. Norms and biases stay float32."""
    new: dict[str, Any] = {}
    for name, part in block.items():
        if isinstance(part, dict) and "rows" in part:
            new[name] = part  # as it is already
        elif isinstance(part, dict) and "kernel" in part:
            kernel = part["kernel"].reshape(math.prod(part["kernel"].shape[: inputs_of(name)]), -1)
            new[name] = {**{k: v.astype(jnp.float32) for k, v in part.items() if k != "kernel"}, **rows(kernel.T, weights)}
        else:
            new[name] = inference_block(part, weights=weights) if isinstance(part, dict) else part.astype(jnp.float32)
    return new


def inference_params(params: dict[str, Any], *, weights: str = "float32") -> dict[str, Any]:
    """The parameters as decoding reads them: blocks apart, each as `inference_block`, and so the tables; learned positions stay float32."""
    one = functools.partial(inference_block, weights=weights)
    blocks = tree.unstack(params["blocks"]) if isinstance(params["blocks"], dict) else params["blocks"]
    table = params["embed"] if "rows" in params["embed"] else rows(params["embed"]["tokens"], weights)
    kept = {name: params["embed"][name].astype(jnp.float32) for name in ("positions", "prompt") if name in params["embed"]}
    result: dict[str, Any] = {"blocks": tuple(one(block) for block in blocks), "embed": {**table, **kept}, "final_norm": one(params["final_norm"])}
    if "head" in params:
        result["head"] = params["head"] if "rows" in params["head"] else rows(params["head"]["kernel"], weights)
    if "score" in params:
        result["score"] = {"kernel": params["score"]["kernel"].astype(jnp.float32)}
    return result


def matrix(weight: Any) -> Array:
    """float32 [F, D] that `rows` stand for."""
    found = weight["rows"].astype(jnp.float32)
    return found * weight["row_scale"][:, None] if "row_scale" in weight else found


@jax.custom_vjp
def times_rows(x: Array, weight: Any) -> Array:
    """x [N, D] times the `rows` [F, D] of a matrix: float32 [N, F].

    Only the weights are rounded (accelerators round x to bfloat16 too). On a CPU, passes over small weights for a few rows of x each beat converting
    the weights (up to `_PASSES`; measured in experiments/LOG.md). The weights are frozen: only x has a gradient."""
    x, rows = jax.lax.optimization_barrier((x, weight["rows"]))  # tied to x, or a loop of decoding would keep converted weights
    product = lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if jax.default_backend() != "cpu":
        y = product(*([x, rows] if rows.dtype == x.dtype else [x.astype(jnp.bfloat16), rows.astype(jnp.bfloat16)]))
    elif len(x) <= products.FEW * (1 if rows.dtype == x.dtype else _PASSES):
        y = jnp.concatenate([products.few_rows(x[None, i : i + products.FEW], rows[None])[0] for i in range(0, len(x), products.FEW)])
    else:
        kind = jnp.promote_types(x.dtype, rows.dtype)
        x, rows = x.astype(kind), fence(rows.astype(kind))
        y = fence(product(rows, x)).T if len(x) < 64 else fence(product(x, rows))  # the right one is packed anew in every call
    return y * weight["row_scale"] if "row_scale" in weight else y


def _forward(x: Array, weight: Any) -> tuple[Array, tuple[Array, Any]]:
    return times_rows(x, weight), (x, weight)


def _backward(saved: tuple[Array, Any], g: Array) -> tuple[Array, Any]:
    x, weight = saved
    nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jax.dtypes.float0 if w.dtype == jnp.int8 else w.dtype), weight)
    return (g @ matrix(weight)).astype(x.dtype), nothing


times_rows.defvjp(_forward, _backward)
