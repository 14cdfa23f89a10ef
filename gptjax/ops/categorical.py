"""Tokens drawn with given probabilities, and their log-probabilities."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

from gptjax.ops.materialize import kept, unchanged
from gptjax.ops.products import row_sum

_NEIGHBOURS = 256  # tokens of a group
_VECTOR = 16  # groups: what is left over of a vector may be rounded in another way


def draw(
    logits_BV: Float32[Array, "B V"], keys_B: Key[Array, " B"], *, in_order: bool = False
) -> Int32[Array, " B"]:
    """int32 [B]: a token of each row, drawn with the probabilities softmax(logits).

    The largest of log-probabilities with Gumbel noise, among groups of neighbouring tokens and then
    in one group: 448 random numbers for 49,152 tokens, a tenth of a CPU's time for noise for each.
    As with noise for each, logits that are rounded otherwise give the same token but for ties,
    which they would not by inverting a distribution function.

    in_order: for slots, the same bits of a row's sums however many rows there are.
    """
    keep, add = (kept, row_sum) if in_order else (unchanged, functools.partial(jnp.sum, axis=-1))
    batch, vocab_size = logits_BV.shape
    filler = -vocab_size % (_NEIGHBOURS * _VECTOR)
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, filler)), constant_values=-jnp.inf)
    logits_BGN = keep(padded_BV.reshape(batch, -1, _NEIGHBOURS))
    peak_B = logits_BV.max(-1)[:, None, None]
    shifted_BGN = jnp.where(logits_BGN == peak_B, 0.0, logits_BGN - peak_B)  # inf - inf is nan
    sums_BG = add(jnp.exp(shifted_BGN))
    groups = sums_BG.shape[1]
    noise = lambda key: jax.random.gumbel(key, (groups + _NEIGHBOURS,))
    noise_BM = jax.vmap(noise)(keys_B)
    group_B = jnp.argmax(jnp.log(sums_BG) + noise_BM[:, :groups], -1)
    own_BN = jnp.take_along_axis(logits_BGN, group_B[:, None, None], 1)[:, 0]
    token_B = jnp.argmax(own_BN + noise_BM[:, groups:], -1)
    drawn_B = group_B * _NEIGHBOURS + token_B
    return jnp.minimum(drawn_B, vocab_size - 1).astype(jnp.int32)  # where all are -inf


def logprob(logits: Float32[Array, "*S V"], tokens: Int32[Array, "*S"]) -> Float32[Array, "*S"]:
    """log softmax(logits [..., V]) at tokens [...], float32."""
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
