"""Parameters in the form in which inference uses them: matrices as rows [out, in].

Rows are float32, bfloat16 or int8 with a scale (`ops/quantized.py` has the products with them). A
product with one vector reads every weight once, so the bytes of the weights are the time it takes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.ops.quantized import quantize_rows
from gptjax.ops.unstack import unstack


def input_axes(layer: str) -> int:
    """Leading input axes of a layer's kernel [*in, *out], by the layer's name or path."""
    return 2 if layer.rpartition("/")[2] == "out" else 1


def inference_block(block: dict[str, Any], *, weights: str = "float32") -> dict[str, Any]:
    """One block, or any other module, with `rows` in place of each kernel.

    weights: float32, bfloat16 or int8. Norms and biases become float32; rows stay as they are, of
    gate and up together.
    """
    result: dict[str, Any] = {}
    for name, part in block.items():
        if not isinstance(part, dict):
            result[name] = part.astype(jnp.float32)
        elif "rows" in part:
            result[name] = _gates_together(part)
        elif "kernel" in part:
            shape = part["kernel"].shape
            matrix = part["kernel"].reshape(math.prod(shape[: input_axes(name)]), -1)
            rest = {k: v.astype(jnp.float32) for k, v in part.items() if k != "kernel"}
            result[name] = {**rest, **quantize_rows(matrix.T, weights)}
        else:
            result[name] = inference_block(part, weights=weights)
    return result


def inference_params(params: dict[str, Any], *, weights: str = "float32") -> dict[str, Any]:
    """All parameters in that form: the blocks as a tuple, and rows in place of the tables.

    params: blocks stacked on axis 0, or a tuple already. Learned positions become float32.
    """
    blocks = params["blocks"]
    if isinstance(blocks, dict):
        blocks = unstack(blocks)
    embed = params["embed"]
    table = embed if "rows" in embed else quantize_rows(embed["tokens"], weights)
    vectors = {}
    for name in ("positions", "prompt"):
        if name in embed:
            vectors[name] = embed[name].astype(jnp.float32)
    result: dict[str, Any] = {
        "blocks": tuple(inference_block(block, weights=weights) for block in blocks),
        "embed": {**table, **vectors},
        "final_norm": inference_block(params["final_norm"], weights=weights),
    }
    if "head" in params:
        head = params["head"]
        result["head"] = head if "rows" in head else quantize_rows(head["kernel"], weights)
    if "score" in params:
        result["score"] = {"kernel": params["score"]["kernel"].astype(jnp.float32)}
    return result


def _gates_together(layer: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `gates_apart`."""
    result = dict(layer)
    if layer["rows"].ndim == 3:
        result["rows"] = layer["rows"].reshape(-1, layer["rows"].shape[-1])
        if "row_scale" in layer:
            result["row_scale"] = layer["row_scale"].reshape(-1)
    return result


def block_of(params: dict[str, Any], layer: int) -> dict[str, Any]:
    """The parameters of one block, of blocks stacked on axis 0 or a tuple."""
    blocks: Any = params["blocks"]
    if isinstance(blocks, tuple):
        return blocks[layer]
    return jax.tree.map(lambda array: array[layer], blocks)


def gates_apart(params: dict[str, Any]) -> dict[str, Any]:
    """The result of `inference_params` with rows of gate and up apart, [2, F, D]: so devices along
    `tensor` can split the hidden units. `memory.whole_layer` joins them.
    """

    def apart(block: dict[str, Any]) -> dict[str, Any]:
        if "gate_up" not in block["mlp"]:
            return block
        layer = dict(block["mlp"]["gate_up"])
        for part, axes in (("rows", 2), ("row_scale", 1)):
            if part in layer and layer[part].ndim == axes:
                layer[part] = layer[part].reshape(2, -1, *layer[part].shape[1:])
        return block | {"mlp": block["mlp"] | {"gate_up": layer}}

    return params | {"blocks": tuple(map(apart, params["blocks"]))}


def divisible(params: dict[str, Any], parts: int) -> dict[str, Any]:
    """`gates_apart`, and with rows of zeros behind the vocabulary, so that it has so many parts."""
    result = gates_apart(params)
    for name in ("embed", "head"):
        if name in params:
            filled = dict(params[name])
            padding = -len(filled["rows"]) % parts
            for part in ("rows", "row_scale"):
                if part in filled:
                    axes = [(0, padding), *[(0, 0)] * (filled[part].ndim - 1)]
                    filled[part] = jnp.pad(filled[part], axes)
            result[name] = filled
    return result
