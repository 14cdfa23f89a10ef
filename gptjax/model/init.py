"""The parameters of a model before training: their shapes, and their random start."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.core.types import Array, Params
from gptjax.model.draw import Piece, own_parts
from gptjax.model.layers import Norm
from gptjax.model.transformer import Block
from gptjax.ops.attention.mask import Mask
from gptjax.runtime import sharding

# Standard deviation by path, as a multiple of `init_std`; GPT-2 scales the projections into the
# residual stream by 1 / sqrt(2 L) (Radford et al. 2019, section 2.3). None: the constant that the
# module itself starts with.
INIT_SCALES: tuple[tuple[str, Any], ...] = (
    (r".*/(scale|bias)", None),
    (r"blocks/(attn/out|mlp/down)/kernel", lambda config: 1 / math.sqrt(2 * config.layers)),
    (r".*", lambda config: 1.0),
)


def init_params(config: ModelConfig, key: Array, *, mesh: Mesh | None = None) -> Params:
    """{"embed": {...}, "blocks": {... [L, ...]}, "final_norm": {...}}, with "head" if untied, or
    "score" where the config has labels; float32.

    All normal numbers are one draw of rows of width D, split up afterwards: a draw per parameter
    takes seconds to compile on a CPU. On a mesh, each device draws its part of them.
    """
    constants = _constants(config)
    drawn = {  # path: rows of width D
        path: leaf.size // config.width
        for path, leaf in tree.flatten(constants).items()
        if tree.first_match(INIT_SCALES, path)
    }
    starts = dict(zip(drawn, itertools.accumulate([0, *drawn.values()]), strict=False))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(constants).items() if path in drawn}
    if mesh is None or mesh.size == 1:
        total = sum(drawn.values())
        # without it XLA may round the last few numbers otherwise than it always has
        total += -total % 1024
        rows = jax.lax.optimization_barrier(jax.random.normal(key, (total, config.width)))
        normal = {
            path: rows[at : at + drawn[path]].reshape(shapes[path]) for path, at in starts.items()
        }
    else:
        specs = {path: tree.first_match(sharding.RULES, path) for path in drawn}
        pieces = [Piece(starts[path] * config.width, shapes[path], specs[path]) for path in drawn]
        draw = sharding.on_each_device(
            mesh, lambda key: own_parts(key, pieces), in_specs=P(), out_specs=[*specs.values()]
        )
        normal = dict(zip(drawn, draw(key), strict=True))

    def fill(path: str, constant: Array) -> Array:
        scale = tree.first_match(INIT_SCALES, path)
        return constant if scale is None else config.init_std * scale(config) * normal[path]

    return tree.map_with_path(fill, constants)


def _constants(config: ModelConfig) -> Params:
    """All parameters, each filled with the constant that its module starts with: 1 or 0."""
    # Shapes do not depend on the backend of attention, and some refuse a platform or a length.
    c = dataclasses.replace(config, attention="reference")
    x, index = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1), jnp.int32)
    init_block = lambda: Block(c).init(jax.random.key(0), x, index, Mask(index))["params"]
    block = jax.eval_shape(init_block)
    norm = jax.eval_shape(Norm(c).init, jax.random.key(0), x)["params"]

    def fill(path: str, shape: tuple[int, ...]) -> Array:
        is_one = path.endswith("scale") and not c.norm_plus_one
        return jnp.full(shape, float(is_one), jnp.float32)

    params: Params = {
        "embed": {"tokens": jnp.zeros((c.padded_vocab, c.width))},
        "blocks": tree.map_with_path(lambda path, p: fill(path, (c.layers, *p.shape)), block),
        "final_norm": tree.map_with_path(lambda path, p: fill(path, p.shape), norm),
    }
    if c.positions == "learned":
        params["embed"]["positions"] = jnp.zeros((c.context, c.width))
    if c.labels:
        params["score"] = {"kernel": jnp.zeros((len(c.labels), c.width))}
    elif not c.tie_embeddings:
        params["head"] = {"kernel": jnp.zeros((c.padded_vocab, c.width))}
    return params


@functools.lru_cache(8)
def param_shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of what `init_params` makes."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Parameters of the model proper, without the padding of the vocabulary."""
    shapes = param_shapes(config)
    tables = 1 if config.tie_embeddings or config.labels else 2
    padding = tables * (config.padded_vocab - config.vocab_size) * config.width
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - padding


@functools.lru_cache(8)
def kernel_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape of one layer (below blocks/) or of the whole parameter}."""
    return {
        path: tuple(s.shape[1:] if path.startswith("blocks/") else s.shape)
        for path, s in tree.flatten(param_shapes(c)).items()
    }
