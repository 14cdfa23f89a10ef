"""Matrices as decoding reads them: rows [out, in] in float32, bfloat16 or int8, and the product with them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from gptjax.core import tree
from gptjax.ops.quantized import quantize_rows


def input_axes(layer: str) -> int:
    """Leading input axes of a layer's kernel [*in, *out], by its name or path."""
    return 2 if layer.rpartition("/")[2] == "out" else 1


def inference_block(block: dict[str, Any], *, weights: str = "float32") -> dict[str, Any]:
    """One block, or any other module, as decoding reads it: each matrix as `rows` in `weights`: float32, bfloat16 or int8. A product with
    one vector reads every weight once, so their bytes are the time it takes. Norms and biases stay float32."""
    new: dict[str, Any] = {}
    for name, part in block.items():
        if isinstance(part, dict) and "rows" in part:
            new[name] = part  # as it is already
        elif isinstance(part, dict) and "kernel" in part:
            kernel = part["kernel"].reshape(math.prod(part["kernel"].shape[: input_axes(name)]), -1)
            new[name] = {
                **{k: v.astype(jnp.float32) for k, v in part.items() if k != "kernel"},
                **quantize_rows(kernel.T, weights),
            }
        else:
            new[name] = (
                inference_block(part, weights=weights)
                if isinstance(part, dict)
                else part.astype(jnp.float32)
            )
    return new


def inference_params(params: dict[str, Any], *, weights: str = "float32") -> dict[str, Any]:
    """The parameters as decoding reads them: blocks apart, each as `inference_block`, and so the tables; learned positions stay float32."""
    one = functools.partial(inference_block, weights=weights)
    blocks = (
        tree.unstack(params["blocks"]) if isinstance(params["blocks"], dict) else params["blocks"]
    )
    table = (
        params["embed"]
        if "rows" in params["embed"]
        else quantize_rows(params["embed"]["tokens"], weights)
    )
    kept = {
        name: params["embed"][name].astype(jnp.float32)
        for name in ("positions", "prompt")
        if name in params["embed"]
    }
    result: dict[str, Any] = {
        "blocks": tuple(one(block) for block in blocks),
        "embed": {**table, **kept},
        "final_norm": one(params["final_norm"]),
    }
    if "head" in params:
        result["head"] = (
            params["head"]
            if "rows" in params["head"]
            else quantize_rows(params["head"]["kernel"], weights)
        )
    if "score" in params:
        result["score"] = {"kernel": params["score"]["kernel"].astype(jnp.float32)}
    return result
