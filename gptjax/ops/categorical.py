"""One token of each row, drawn with given probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

from gptjax.ops.materialize import kept
from gptjax.ops.products import row_sum

_NEIGHBOURS = 256  # tokens of a group
_VECTOR = 16  # groups: what is left over of a vector may be rounded in another way


def draw(logits_BV: Float32[Array, "B V"], keys_B: Key[Array, " B"]) -> Int32[Array, " B"]:
    """int32 [B]: a token of each row, drawn with the probabilities softmax(logits).

    The largest of log-probabilities with Gumbel noise, among groups of neighbouring tokens and then
    in one group: 448 random numbers for 49,152 tokens, where noise for each token takes a CPU as
    long as half of a small model. As with noise for each, logits that are rounded otherwise give
    the same token but for ties, which they would not by inverting a distribution function.
    """
    batch, vocab_size = logits_BV.shape
    filler = -vocab_size % (_NEIGHBOURS * _VECTOR)
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, filler)), constant_values=-jnp.inf)
    logits_BGN = kept(padded_BV.reshape(batch, -1, _NEIGHBOURS))
    peak_B = logits_BV.max(-1)[:, None, None]
    shifted_BGN = jnp.where(logits_BGN == peak_B, 0.0, logits_BGN - peak_B)  # inf - inf is nan
    sums_BG = row_sum(jnp.exp(shifted_BGN))
    groups = sums_BG.shape[1]
    noise = lambda key: jax.random.gumbel(key, (groups + _NEIGHBOURS,))
    noise_BM = jax.vmap(noise)(keys_B)
    group_B = jnp.argmax(jnp.log(sums_BG) + noise_BM[:, :groups], -1)
    own_BN = jnp.take_along_axis(logits_BGN, group_B[:, None, None], 1)[:, 0]
    token_B = jnp.argmax(own_BN + noise_BM[:, groups:], -1)
    drawn_B = group_B * _NEIGHBOURS + token_B
    return jnp.minimum(drawn_B, vocab_size - 1).astype(jnp.int32)  # where all are -inf
