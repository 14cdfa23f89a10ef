"""Token ids to the vectors that enter the first block."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
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
    if "rows" in table:
        lookup = IMPLEMENTATIONS[c.implementation].quantized_lookup
        x = lookup(table, tokens).astype(c.dtype)
    else:
        x = table["tokens"][tokens]
    if c.scale_embeddings:
        x = x * jnp.asarray(math.sqrt(c.width), x.dtype)
    if positions is None:
        return x
    if "prompt" in table:
        prompt = table["prompt"]
        prompt_vectors = prompt[jnp.minimum(positions, len(prompt) - 1)].astype(x.dtype)
        x = jnp.where((positions < len(prompt))[..., None], prompt_vectors, x)
    if c.positions == "learned":
        x = x + table["positions"][positions]
    return x
