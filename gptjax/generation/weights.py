"""The parameters in the form that generation uses: blocks apart, matrices as stored rows.

In: parameters in memory, or a checkpoint's files that are read a layer at a time. Out: the tree of
`quantize.inference_params`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from gptjax.checkpoints.safetensors import LazyParams
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.model import init as model_init
from gptjax.model import quantize
from gptjax.ops.implementations import IMPLEMENTATIONS, resolve
from gptjax.runtime.devices import default_platform

WEIGHTS = ("float32", "bfloat16", "int8")


_inference_params = jax.jit(quantize.inference_params, static_argnames="weights")


_inference_block = jax.jit(quantize.inference_block, static_argnames="weights")


def check_dtypes(weights: str, cache_dtype: str) -> None:
    """Raises UserError for a name that is none of `WEIGHTS`; an empty `cache_dtype` is allowed."""
    if weights not in WEIGHTS:
        raise UserError(unknown_name("weights", weights, list(WEIGHTS)))
    if cache_dtype not in ("", *WEIGHTS):
        raise UserError(unknown_name("cache_dtype", cache_dtype, list(WEIGHTS)))


def read_weights(config: ModelConfig, params: Params | LazyParams, weights: str) -> Params:
    """The parameters as generation uses them.

    From files they come a layer at a time, so that memory never holds them twice.
    """
    if not isinstance(params, LazyParams):
        return _inference_params(params, weights=weights)
    # jitted, it would copy what is float32 already, as most is
    convert = quantize.inference_params if weights == "float32" else _inference_params
    rest = convert(params.part(None) | {"blocks": ()}, weights=weights)
    blocks = []
    for layer in range(config.layers):
        blocks.append(_inference_block(params.part(layer), weights=weights))
    return rest | {"blocks": tuple(blocks)}


def weight_shapes(config: ModelConfig, weights: str) -> Any:
    """Shapes and dtypes of what `read_weights` makes of parameters in files."""
    shapes = model_init.param_shapes(config)
    layer = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes["blocks"])
    block = _inference_block.eval_shape(layer, weights=weights)
    rest = _inference_params.eval_shape({**shapes, "blocks": ()}, weights=weights)
    return rest | {"blocks": (block,) * config.layers}


def inference_config(config: ModelConfig, weights: str) -> ModelConfig:
    """The config that generation runs with: its ops are those of the default platform."""
    implementation = resolve(config.implementation, platform=default_platform(), devices=1)
    dtype = "float32"
    if weights != "float32":
        dtype = IMPLEMENTATIONS[implementation].activation_dtype
    return dataclasses.replace(
        config,
        dropout=0.0,
        remat="none",
        attention="reference",
        scan_layers=False,
        dtype=dtype,
        implementation=implementation,
    )
