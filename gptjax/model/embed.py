"""Token ids to the vectors that enter the first block."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.ops import collectives
from gptjax.ops.implementations import IMPLEMENTATIONS


def embed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "*S"],
    positions: Int[Array, "*P"] | None = None,
) -> Float[Array, "*S D"]:
    """Embeddings [..., D] in the compute dtype.

    Of the tokens alone or, with positions, with what is learned for those positions: prompt vectors
    (`lora.prompt_tokens`) in place of the tokens, position embeddings added to them.
    """
    c, table = config, params["embed"]
    if positions is None:
        return _scaled(c, _lookup(c, table, tokens))
    # Devices that share the columns of the tables look the rows of all of them up, each in its own
    # columns, and exchange what they found: no table is gathered.
    shares_columns = collectives.size("fsdp") > 1 and "rows" not in table
    if shares_columns:
        positions = jnp.broadcast_to(positions, tokens.shape)
        tokens, positions = (collectives.gather(ids, "fsdp", 0) for ids in (tokens, positions))
    x = _lookup(c, table, tokens)
    x = collectives.to_residual(x)  # of a table split over `tensor` each found a part
    x, positions = _scaled(c, x), collectives.own_sequence(positions)
    if "prompt" in table:
        prompt = table["prompt"]
        if shares_columns:
            prompt = collectives.part(prompt, "fsdp", 1)
        prompt_vectors = prompt[jnp.minimum(positions, len(prompt) - 1)].astype(x.dtype)
        x = jnp.where((positions < len(prompt))[..., None], prompt_vectors, x)
    if c.positions == "learned":
        learned = table["positions"]
        if not shares_columns:
            learned = collectives.gather(learned, "fsdp", 1)
        x = x + learned[positions]
    return collectives.exchange(x, "fsdp", split=0, join=2) if shares_columns else x


def _scaled(config: ModelConfig, x: Array) -> Array:
    return x * jnp.asarray(math.sqrt(config.width), x.dtype) if config.scale_embeddings else x


def _lookup(config: ModelConfig, table: Params, ids: Array) -> Array:
    """The vectors of these tokens; 0 for tokens that the table of another device has."""

    def own(ids: Array) -> Array:
        if "rows" in table:
            lookup = IMPLEMENTATIONS[config.implementation].quantized_lookup
            return lookup(table, ids).astype(config.dtype)
        return table["tokens"][ids]

    if collectives.size("tensor") == 1:
        return own(ids)
    count = len(table["rows"] if "rows" in table else table["tokens"])
    ids = ids - collectives.index("tensor") * count
    here = (ids >= 0) & (ids < count)
    return jnp.where(here[..., None], own(jnp.where(here, ids, 0)), 0)
