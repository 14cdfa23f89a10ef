"""Attention over blocks of keys: memory linear in their number, forward and backward.

Queries are taken in strips; each runs over the blocks that one of its queries can see, by the slots
of the queries and the window, whatever part of the row they are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gptjax.ops.attention.mask import MASKED, SAVED_NAME, Mask

STRIP = 512  # queries; with the causal rule, T / STRIP strips leave half of the blocks out


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
    t, s = q_BTKGC.shape[1], k_BSKC.shape[1]
    rows, size = min(STRIP, t), min(block, s)
    q_pad, k_pad = -t % rows, -s % size
    # padded queries stand where the last one does; padded keys lie past every query
    q_index = jnp.pad(mask.q_index, ((0, 0), (0, q_pad)), mode="edge")
    q_segments, k_segments = mask.q_segments, mask.k_segments
    if q_segments is not None and k_segments is not None:
        q_segments = jnp.pad(q_segments, ((0, 0), (0, q_pad)), mode="edge")
        k_segments = jnp.pad(k_segments, ((0, 0), (0, k_pad)))
    mask = Mask(q_index, q_segments, k_segments, mask.window, mask.use_window)
    q_BKGTC = jnp.pad(q_BTKGC, ((0, 0), (0, q_pad), (0, 0), (0, 0), (0, 0)))
    q_BKGTC = q_BKGTC.transpose(0, 2, 3, 1, 4)
    k_BKSC, v_BKSC = (
        jnp.pad(x, ((0, 0), (0, k_pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for x in (k_BSKC, v_BSKC)
    )
    y_BKGTC = _blockwise((rows, size), softcap, q_BKGTC, k_BKSC, v_BKSC, mask)
    return y_BKGTC[:, :, :, :t].transpose(0, 3, 1, 2, 4)


class _Strip(NamedTuple):
    """Some queries [B, K, G, R, C] and what the mask says of them; stacked, [N, ...] of each."""

    q: Array
    slots: Array
    segments: Array | None


def _strips(rows: int, q: Array, mask: Mask) -> _Strip:
    segments = None if mask.q_segments is None else _split(mask.q_segments, rows, 1)
    return _Strip(_split(q, rows, 3), _split(mask.q_index, rows, 1), segments)


def _split(x: Array, rows: int, axis: int) -> Array:
    """[N, ...]: the axis cut into N strips of so many rows."""
    cut = x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _join(strips: Array, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(strips, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _keys(x: Array, i: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=2)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class _Scores:
    """The scores of one strip, and the blocks of keys that it runs over."""

    def __init__(self, block: int, softcap: float, strip: _Strip, k: Array, mask: Mask) -> None:
        self.block, self.softcap, self.q, self.k = block, softcap, strip.q, k
        self.mask = Mask(strip.slots, strip.segments, mask.k_segments, mask.window, mask.use_window)
        self.high = jnp.minimum(strip.slots.max() // block + 1, k.shape[2] // block)
        self.low = jnp.zeros_like(self.high)
        if mask.window:
            low = jnp.maximum(strip.slots.min() - mask.window + 1, 0) // block
            holds = True if mask.use_window is None else mask.use_window
            self.low = jnp.where(holds, low, self.low)

    def of(self, i: Array) -> tuple[Array, Array | None]:
        """Masked scores [B, K, G, R, block] of key block i, float32, and the slope of a cap."""
        scores = _product("BKGTC,BKSC->BKGTS", self.q, _keys(self.k, i, self.block))
        scores = scores * self.q.shape[-1] ** -0.5
        slope = None
        if self.softcap:
            tanh = jnp.tanh(scores / self.softcap)
            scores, slope = self.softcap * tanh, 1 - tanh * tanh
        visible = self.mask.allowed(i * self.block, self.block)[:, None, None]
        return jnp.where(visible, scores, MASKED), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    sizes: tuple[int, int], softcap: float, q: Array, k: Array, v: Array, mask: Mask
) -> Array:
    return _forward(sizes, softcap, q, k, v, mask)[0]


def _forward(sizes: tuple[int, int], softcap: float, q: Array, k: Array, v: Array, mask: Mask):
    rows, block = sizes

    def attend(_, strip: _Strip):
        scores_of = _Scores(block, softcap, strip, k, mask)

        def add(i, carry):
            peak, total, out = carry
            scores, _ = scores_of.of(i)
            new_peak = jnp.maximum(peak, scores.max(-1))
            rescale = jnp.exp(peak - new_peak)
            probs = jnp.exp(scores - new_peak[..., None])
            partial = _product("BKGTS,BKSC->BKGTC", probs.astype(v.dtype), _keys(v, i, block))
            return (
                new_peak,
                total * rescale + probs.sum(-1),
                out * rescale[..., None] + partial,
            )

        # above every masked score, so that a block in which a query sees nothing adds exact zeros
        shape = strip.q.shape
        start = (jnp.full(shape[:-1], MASKED / 2), jnp.zeros(shape[:-1]), jnp.zeros(shape))
        peak, total, out = jax.lax.fori_loop(scores_of.low, scores_of.high, add, start)
        return None, ((out / total[..., None]).astype(q.dtype), peak + jnp.log(total))

    _, (outs, log_totals) = jax.lax.scan(attend, None, _strips(rows, q, mask))
    out = checkpoint_name(_join(outs, 3), SAVED_NAME)
    return out, (q, k, v, mask, out, checkpoint_name(log_totals, SAVED_NAME))


def _backward(sizes: tuple[int, int], softcap: float, saved, d_out: Array):
    q, k, v, mask, out, log_totals = saved
    rows, block = sizes
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    scale = q.shape[-1] ** -0.5

    def strip_gradient(carry, inputs):
        strip, d_out, delta, log_total = inputs
        scores_of = _Scores(block, softcap, strip, k, mask)

        def add(i, carry):
            dq, dk, dv = carry
            scores, slope = scores_of.of(i)
            probs = jnp.exp(scores - log_total[..., None])
            d_probs = _product("BKGTC,BKSC->BKGTS", d_out, _keys(v, i, block))
            d_scores = probs * (d_probs - delta[..., None]) * scale
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(q.dtype)
            dq += _product("BKGTS,BKSC->BKGTC", d_scores, _keys(k, i, block))
            dk = _add(dk, _product("BKGTS,BKGTC->BKSC", d_scores, strip.q), i * block)
            dv = _add(dv, _product("BKGTS,BKGTC->BKSC", probs.astype(v.dtype), d_out), i * block)
            return dq, dk, dv

        start = (jnp.zeros(strip.q.shape), *carry)
        dq, dk, dv = jax.lax.fori_loop(scores_of.low, scores_of.high, add, start)
        return (dk, dv), dq.astype(q.dtype)

    inputs = (
        _strips(rows, q, mask),
        _split(d_out.astype(v.dtype), rows, 3),
        _split(delta, rows, 3),
        log_totals,
    )
    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (dk, dv), dq = jax.lax.scan(strip_gradient, zeros, inputs)
    return _join(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype), None


def _add(total: Array, part: Array, start: Array) -> Array:
    """total [B, K, S, C] with the part added to the keys from start on."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)


_blockwise.defvjp(_forward, _backward)
