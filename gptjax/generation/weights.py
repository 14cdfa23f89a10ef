"""The parameters in the form that generation uses: blocks apart, matrices as stored rows.

In: parameters in memory, or a checkpoint's files that are read a layer at a time. Out: the tree of
`quantize.inference_params`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoints.safetensors import LazyParams
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.model import init as model_init
from gptjax.model import quantize
from gptjax.ops.implementations import IMPLEMENTATIONS, resolve
from gptjax.runtime import sharding
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


@functools.partial(jax.jit, static_argnames=("weights", "mesh"))
def _split_params(params: Params, *, weights: str, mesh: Mesh) -> Params:
    """Of parameters that are on the devices of a mesh, in another split."""
    made = quantize.inference_params(params, weights=weights)
    made = quantize.divisible(made, mesh.shape["tensor"])
    return jax.lax.with_sharding_constraint(made, sharding.shardings(mesh, made))


def place_weights(params: Params, mesh: Mesh | None) -> Params:
    """The parameters as generation uses them, each device's part on it."""
    if mesh is None:
        return params
    params = quantize.divisible(params, mesh.shape["tensor"])
    return jax.device_put(params, sharding.shardings(mesh, params))


def read_weights(
    config: ModelConfig, params: Params | LazyParams, weights: str, mesh: Mesh | None = None
) -> Params:
    """The parameters as generation uses them.

    From files they come a layer at a time, so that memory never holds them twice.
    """
    if mesh is not None:
        return _read_onto(config, params, weights, mesh)
    if not isinstance(params, LazyParams):
        return _inference_params(params, weights=weights)
    # jitted, it would copy what is float32 already, as most is
    convert = quantize.inference_params if weights == "float32" else _inference_params
    rest = convert(params.part(None) | {"blocks": ()}, weights=weights)
    blocks = []
    for layer in range(config.layers):
        blocks.append(_inference_block(params.part(layer), weights=weights))
    return rest | {"blocks": tuple(blocks)}


def _read_onto(
    config: ModelConfig, params: Params | LazyParams, weights: str, mesh: Mesh
) -> Params:
    """`read_weights` for a mesh: a layer at a time through the memory of one device, unless the
    parameters are on several devices already."""
    if not isinstance(params, LazyParams) and any(map(_is_split, jax.tree.leaves(params))):
        with jax.set_mesh(mesh):
            return place_weights(_split_params(params, weights=weights, mesh=mesh), mesh)

    def part(layer: int | None) -> Params:
        if isinstance(params, LazyParams):
            return params.part(layer)
        if layer is None:
            return params
        blocks = params["blocks"]
        if isinstance(blocks, tuple):
            return blocks[layer]
        return jax.tree.map(lambda array: array[layer], blocks)

    rest = _inference_params(part(None) | {"blocks": ()}, weights=weights)
    placed = place_weights(rest, mesh)
    blocks: tuple[Params, ...] = ()
    for layer in range(config.layers):
        block = _inference_block(part(layer), weights=weights)
        blocks += place_weights({"blocks": (block,)}, mesh)["blocks"]
    return placed | {"blocks": blocks}


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def weight_shapes(config: ModelConfig, weights: str, mesh: Mesh | None = None) -> Any:
    """Shapes and dtypes of what `read_weights` makes of parameters in files."""
    shapes = model_init.param_shapes(config)
    layer = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes["blocks"])
    block = _inference_block.eval_shape(layer, weights=weights)
    rest = _inference_params.eval_shape({**shapes, "blocks": ()}, weights=weights)
    made = rest | {"blocks": (block,) * config.layers}
    if mesh is None:
        return made
    divisible = functools.partial(quantize.divisible, parts=mesh.shape["tensor"])
    return sharding.with_shardings(mesh, jax.eval_shape(divisible, made))


def inference_config(config: ModelConfig, weights: str, mesh: Mesh | None = None) -> ModelConfig:
    """The config that generation runs with: its ops are those of the mesh's platform, or of the
    default one."""
    platform = mesh.devices.flat[0].platform if mesh else default_platform()
    implementation = resolve(config.implementation, platform=platform)
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
