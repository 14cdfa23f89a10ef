"""Attention over blocks of keys: memory linear in their number, forward and backward."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.ops.attention.mask import MASKED, Mask


def blockwise(
    q_BTKGC: Float[Array, "B T K G C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    mask: Mask,
    *,
    block: int = 256,
    dropout_BKGTS: Float[Array, "B K G T S"] | None = None,
    softcap: float = 0.0,
) -> Float[Array, "B T K G C"]:
    """As `reference`: an online softmax (Rabe & Staats 2021; Dao et al. 2022), recomputed block by
    block in the backward pass. Raises ValueError for dropout, which it has not."""
    if dropout_BKGTS is not None:
        raise ValueError(
            "blockwise attention has no dropout on its weights: "
            "use model.attention = 'xla' or model.dropout = 0"
        )
    size = min(block, k_BSKC.shape[1])
    pad = -k_BSKC.shape[1] % size
    if pad:  # padded slots lie past every query, so the causal rule hides them
        k_BSKC, v_BSKC = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k_BSKC, v_BSKC))
        if mask.k_segments is not None:
            mask = dataclasses.replace(
                mask, k_segments=jnp.pad(mask.k_segments, ((0, 0), (0, pad)))
            )
    return _blockwise(size, softcap, q_BTKGC, k_BSKC, v_BSKC, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(block: int, softcap: float, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return _blockwise_forward(block, softcap, q, k, v, mask)[0]


def _block_scores(
    block: int, softcap: float, i: Array, q: Array, k: Array, mask: Mask
) -> tuple[Array, Array | None]:
    """Masked scores [B, K, G, T, block] of key block i, float32, and the slope of a soft cap."""
    k_i = jax.lax.dynamic_slice_in_dim(k, i * block, block, axis=1)
    scores = (
        jnp.einsum("BTKGC,BSKC->BKGTS", q, k_i, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    slope = None
    if softcap:
        tanh = jnp.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh * tanh
    return jnp.where(mask.allowed(i * block, block)[:, None, None], scores, MASKED), slope


def _blockwise_forward(block: int, softcap: float, q: Array, k: Array, v: Array, mask: Mask):
    b, t, heads, groups, c = q.shape

    def body(carry, i):
        peak, total, out = carry
        scores, _ = _block_scores(block, softcap, i, q, k, mask)
        new_peak = jnp.maximum(peak, scores.max(-1))
        rescale = jnp.exp(peak - new_peak)
        probs = jnp.exp(scores - new_peak[..., None])
        v_i = jax.lax.dynamic_slice_in_dim(v, i * block, block, axis=1)
        partial = jnp.einsum(
            "BKGTS,BSKC->BKGTC", probs.astype(v.dtype), v_i, preferred_element_type=jnp.float32
        )
        return (new_peak, total * rescale + probs.sum(-1), out * rescale[..., None] + partial), None

    # above every masked score, so that a block in which a query sees nothing adds exact zeros
    start = (
        jnp.full((b, heads, groups, t), MASKED / 2),
        jnp.zeros((b, heads, groups, t)),
        jnp.zeros((b, heads, groups, t, c)),
    )
    (peak, total, out), _ = jax.lax.scan(body, start, jnp.arange(k.shape[1] // block))
    result = jnp.einsum("BKGTC->BTKGC", out / total[..., None]).astype(q.dtype)
    return result, (q, k, v, mask, result, peak + jnp.log(total))


def _blockwise_backward(block: int, softcap: float, saved, d_out: Array):
    q, k, v, mask, out, log_total = saved
    scale = q.shape[-1] ** -0.5
    d_out = d_out.astype(jnp.float32)
    delta = jnp.einsum("BTKGC,BTKGC->BKGT", d_out, out.astype(jnp.float32))

    def body(dq, i):
        scores, slope = _block_scores(block, softcap, i, q, k, mask)
        probs = jnp.exp(scores - log_total[..., None])
        k_i, v_i = (
            jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1).astype(jnp.float32)
            for x in (k, v)
        )
        d_scores = probs * (jnp.einsum("BTKGC,BSKC->BKGTS", d_out, v_i) - delta[..., None]) * scale
        if slope is not None:
            d_scores = d_scores * slope
        dk_i = jnp.einsum("BKGTS,BTKGC->BSKC", d_scores, q.astype(jnp.float32))
        dv_i = jnp.einsum("BKGTS,BTKGC->BSKC", probs, d_out)
        return dq + jnp.einsum("BKGTS,BSKC->BTKGC", d_scores, k_i), (dk_i, dv_i)

    dq, blocks = jax.lax.scan(
        body, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[1] // block)
    )
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k.shape) for x in blocks)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
