"""Attention by plain XLA with a hand-written gradient, several times faster to train on a CPU.

Heads come first; queries are cut into up to four strips, each of which skips the keys after it; and
the division by the softmax's sum moves from the [T, S] weights to the [T, C] outputs. Like
`reference`, it holds the weights of all heads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gptjax.ops.attention.mask import MASKED, SAVED_NAME, Mask
from gptjax.ops.attention.reference import reference
from gptjax.ops.materialize import Barrier, unchanged


def xla(
    q_BTKGC: Float[Array, "B T K G C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    mask: Mask,
    *,
    block: int = 0,
    dropout_BKGTS: Float[Array, "B K G T S"] | None = None,
    softcap: float = 0.0,
    barrier: Barrier = unchanged,
) -> Float[Array, "B T K G C"]:
    """As `reference`; barrier: what keeps XLA from computing a value once per reader."""
    if softcap:  # the gradient below knows no cap
        return reference(
            q_BTKGC, k_BSKC, v_BSKC, mask, dropout_BKGTS=dropout_BKGTS, softcap=softcap
        )
    visible = mask.allowed(0, k_BSKC.shape[1])[:, None, None]
    y_BTKGC = _xla(barrier, q_BTKGC, k_BSKC, v_BSKC, visible, dropout_BKGTS)
    return checkpoint_name(y_BTKGC, SAVED_NAME)


class _Strip(NamedTuple):
    """Queries [start, end) and the keys [0, keys) that they can see."""

    start: int
    end: int
    keys: int


def _strips(t: int, s: int) -> list[_Strip]:
    """Up to four strips of at least 128 of T queries; those after a cache may see all S keys."""
    n = min(4, t // 128) if t == s else 1
    if n <= 1:
        return [_Strip(0, t, s)]
    return [_Strip(i * t // n, (i + 1) * t // n, (i + 1) * t // n) for i in range(n)]


class _Saved(NamedTuple):
    """What the backward pass needs: q (scaled), k, v with heads first; weights before division."""

    q: Array
    k: Array
    v: Array
    dropout: Array | None
    out: Array
    weights: list[Array]
    inverse_sum: Array


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _dropout_of(dropout: Array | None, strip: _Strip) -> Array | None:
    return None if dropout is None else dropout[:, :, :, strip.start : strip.end, : strip.keys]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _xla(
    barrier: Barrier, q: Array, k: Array, v: Array, visible: Array, dropout: Array | None
) -> Array:
    return _forward(barrier, q, k, v, visible, dropout)[0]


def _forward(
    barrier: Barrier, q: Array, k: Array, v: Array, visible: Array, dropout: Array | None
) -> tuple[Array, _Saved]:
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q = barrier(q.transpose(0, 2, 3, 1, 4) * scale)
    k, v = barrier(k.transpose(0, 2, 1, 3)), barrier(v.transpose(0, 2, 1, 3))
    outs, weights, inverses = [], [], []
    for strip in _strips(q.shape[3], k.shape[2]):
        start, end, keys = strip
        q_strip = q[:, :, :, start:end]
        scores = barrier(_product("BKGTC,BKSC->BKGTS", q_strip, k[:, :, :keys]))
        scores = jnp.where(visible[:, :, :, start:end, :keys], scores, MASKED)
        weight = barrier(jnp.exp(scores - scores.max(-1, keepdims=True)))
        inverse = 1 / weight.sum(-1, keepdims=True)
        multiplier = _dropout_of(dropout, strip)
        dropped = weight if multiplier is None else weight * multiplier
        out = _product("BKGTS,BKSC->BKGTC", dropped.astype(v.dtype), v[:, :, :keys])
        outs.append(out * inverse)
        weights.append(weight)
        inverses.append(inverse)
    result = barrier(jnp.concatenate(outs, 3).transpose(0, 3, 1, 2, 4).astype(v.dtype))
    return result, _Saved(q, k, v, dropout, result, weights, jnp.concatenate(inverses, 3))


def _backward(barrier: Barrier, saved: _Saved, g: Array):
    q, k, v, dropout, out, weights, inverse = saved
    g = g.astype(jnp.float32)
    delta = (g * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)[..., None]
    # both over the softmax's sum, since the weights are before their division by it
    g, delta = barrier(g.transpose(0, 2, 3, 1, 4) * inverse), barrier(delta * inverse)
    dtype, dk, dv = v.dtype, jnp.zeros(k.shape), jnp.zeros(v.shape)
    dq = []
    for strip, weight in zip(_strips(q.shape[3], k.shape[2]), weights, strict=True):
        start, end, keys = strip
        multiplier = _dropout_of(dropout, strip)
        q_strip, g_strip = q[:, :, :, start:end], g[:, :, :, start:end].astype(dtype)
        d_weight = barrier(_product("BKGTC,BKSC->BKGTS", g_strip, v[:, :, :keys]))
        d_weight = d_weight if multiplier is None else d_weight * multiplier
        d_scores = barrier(weight * (d_weight - delta[:, :, :, start:end])).astype(dtype)
        dropped = (weight if multiplier is None else weight * multiplier).astype(dtype)
        dq.append(_product("BKGTS,BKSC->BKGTC", d_scores, k[:, :, :keys]))
        later_keys = ((0, 0), (0, 0), (0, k.shape[2] - keys), (0, 0))
        dk += jnp.pad(_product("BKGTS,BKGTC->BKSC", d_scores, q_strip), later_keys)
        dv += jnp.pad(_product("BKGTS,BKGTC->BKSC", dropped, g_strip), later_keys)
    d_query = jnp.concatenate(dq, 3).transpose(0, 3, 1, 2, 4) * q.shape[-1] ** -0.5
    d_key, d_value = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype), None, None


_xla.defvjp(_forward, _backward)
