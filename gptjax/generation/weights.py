"""The parameters in the form that generation uses: matrices as stored rows.

In: parameters in memory, or a checkpoint's files that are read a layer at a time. Out: the tree of
`quantize.inference_params`; where programs loop over the layers (`Ops.loops_layers`), with the
blocks stacked on axis 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoints.safetensors import LazyParams
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.model import init as model_init
from gptjax.model import quantize
from gptjax.ops.implementations import IMPLEMENTATIONS, resolve
from gptjax.runtime import sharding
from gptjax.runtime.devices import platform_of

WEIGHTS = ("float32", "bfloat16", "int8")


_inference_params = jax.jit(quantize.inference_params, static_argnames="weights")


_inference_block = jax.jit(quantize.inference_block, static_argnames="weights")


@functools.partial(jax.jit, donate_argnames="blocks")
def _put_layer(blocks: Params, block: Params, layer: Any) -> Params:
    return jax.tree.map(lambda stack, own: stack.at[layer].set(own), blocks, block)


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

    They are made a layer at a time, so that memory never holds those of files twice.
    """
    if mesh is not None:
        return _read_onto(config, params, weights, mesh)
    part = _parts(params)
    # jitted, it would copy what a file has in float32 already, as most is
    is_own = weights == "float32" and isinstance(params, LazyParams)
    convert = quantize.inference_params if is_own else _inference_params
    rest = convert(part(None) | {"blocks": ()}, weights=weights)
    blocks = (_inference_block(part(layer), weights=weights) for layer in range(config.layers))
    if not loops_layers(config, mesh):
        return rest | {"blocks": tuple(blocks)}
    first = next(blocks)
    stacked = jax.tree.map(lambda x: jnp.zeros((config.layers, *x.shape), x.dtype), first)
    for layer, block in enumerate(itertools.chain([first], blocks)):
        stacked = _put_layer(stacked, block, np.int32(layer))
    return rest | {"blocks": stacked}


def _parts(params: Params | LazyParams) -> Callable[[int | None], Params]:
    """What gives a layer, or with None all but the layers."""
    if isinstance(params, LazyParams):
        return params.part
    return lambda layer: params if layer is None else quantize.block_of(params, layer)


def _read_onto(
    config: ModelConfig, params: Params | LazyParams, weights: str, mesh: Mesh
) -> Params:
    """`read_weights` for a mesh: a layer at a time through the memory of one device, unless the
    parameters are on several devices already."""
    if not isinstance(params, LazyParams) and any(map(_is_split, jax.tree.leaves(params))):
        with jax.set_mesh(mesh):
            return place_weights(_split_params(params, weights=weights, mesh=mesh), mesh)

    part = _parts(params)
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
    if loops_layers(config, mesh):
        described = lambda s: jax.ShapeDtypeStruct((config.layers, *s.shape), s.dtype)
        return rest | {"blocks": jax.tree.map(described, block)}
    made = rest | {"blocks": (block,) * config.layers}
    if mesh is None:
        return made
    divisible = functools.partial(quantize.divisible, parts=mesh.shape["tensor"])
    return sharding.with_shardings(mesh, jax.eval_shape(divisible, made))


def _implementation(config: ModelConfig, mesh: Mesh | None) -> str:
    return resolve(config.implementation, platform=platform_of(mesh))


def loops_layers(config: ModelConfig, mesh: Mesh | None) -> bool:
    """Whether programs of generation are loops over stacked blocks."""
    return mesh is None and IMPLEMENTATIONS[_implementation(config, mesh)].loops_layers


def inference_config(config: ModelConfig, weights: str, mesh: Mesh | None = None) -> ModelConfig:
    """The config that generation runs with: its ops are those of the mesh's platform, or of the
    default one."""
    implementation = _implementation(config, mesh)
    dtype = "float32"
    if weights != "float32":
        dtype = IMPLEMENTATIONS[implementation].activation_dtype
    return dataclasses.replace(
        config,
        dropout=0.0,
        remat="none",
        attention="reference",
        scan_layers=loops_layers(config, mesh),
        dtype=dtype,
        implementation=implementation,
    )
