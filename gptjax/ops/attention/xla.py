"""Attention: one mask specification, and the backends that honour it.

q [B, T, K, G, C] (K key/value heads, G query heads on each), k and v [B, S, K, C] -> [B, T, K, G, C].
`reference` is the definition. `xla` is the same, several times faster to train on a CPU; both hold all B*H*T*S weights. `blockwise` holds one block of keys at a time, forward and backward,
so its memory is linear in S. To add a backend, write a function of the same form and add it to `BACKENDS`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops.attention.mask import MASKED, Mask
from gptjax.ops.materialize import materialize


def xla(
    q_BTKGC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    mask: Mask,
    *,
    block: int = 0,
    keep: Array | None = None,
) -> Array:
    """The same with a hand-written gradient: heads first, queries in up to four strips that skip the keys after them, and the
    division by the softmax's sum moved from the [T, S] weights to the [T, C] outputs. float32 softmax."""
    allowed = mask.allowed(0, k_BSKC.shape[1])[:, None, None]
    return _xla(q_BTKGC, k_BSKC, v_BSKC, allowed, keep)


def _strips(t: int, s: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, keys they can see). Queries that continue a cache may see all of it."""
    n = min(4, t // 128) if t == s else 1
    return (
        [(i * t // n, (i + 1) * t // n, (i + 1) * t // n) for i in range(n)]
        if n > 1
        else [(0, t, s)]
    )


@jax.custom_vjp
def _xla(q: Array, k: Array, v: Array, allowed: Array, keep: Array | None) -> Array:
    return _xla_forward(q, k, v, allowed, keep)[0]


def _xla_forward(q: Array, k: Array, v: Array, allowed: Array, keep: Array | None):
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (
        materialize(x)
        for x in (
            q.transpose(0, 2, 3, 1, 4) * scale,
            k.transpose(0, 2, 1, 3),
            v.transpose(0, 2, 1, 3),
        )
    )
    outs, weights, inverses = [], [], []
    for a, b, s in _strips(q.shape[3], k.shape[2]):
        scores = materialize(
            jnp.einsum(
                "BKGTC,BKSC->BKGTS",
                q[:, :, :, a:b],
                k[:, :, :s],
                preferred_element_type=jnp.float32,
            )
        )
        scores = jnp.where(allowed[:, :, :, a:b, :s], scores, MASKED)
        weight = materialize(jnp.exp(scores - scores.max(-1, keepdims=True)))
        inverse = 1 / weight.sum(-1, keepdims=True)
        kept = weight if keep is None else weight * keep[:, :, :, a:b, :s]
        out = jnp.einsum(
            "BKGTS,BKSC->BKGTC",
            kept.astype(v.dtype),
            v[:, :, :s],
            preferred_element_type=jnp.float32,
        )
        outs.append(out * inverse)
        weights.append(weight)
        inverses.append(inverse)
    out = materialize(jnp.concatenate(outs, 3).transpose(0, 3, 1, 2, 4).astype(v.dtype))
    return out, (q, k, v, keep, out, weights, jnp.concatenate(inverses, 3))


def _xla_backward(saved: tuple, g: Array):
    q, k, v, keep, out, weights, inverse = saved
    g = g.astype(jnp.float32)
    delta = (g * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)[..., None]
    g, delta = (
        materialize(g.transpose(0, 2, 3, 1, 4) * inverse),
        materialize(delta * inverse),
    )  # gradients over the softmax's sum
    low, dk, dv = v.dtype, jnp.zeros(k.shape), jnp.zeros(v.shape)
    dq = []
    for (a, b, s), weight in zip(_strips(q.shape[3], k.shape[2]), weights, strict=True):
        keep_ab = None if keep is None else keep[:, :, :, a:b, :s]
        q_ab, g_ab = q[:, :, :, a:b], g[:, :, :, a:b].astype(low)
        d_weight = materialize(
            jnp.einsum("BKGTC,BKSC->BKGTS", g_ab, v[:, :, :s], preferred_element_type=jnp.float32)
        )
        d_weight = d_weight if keep_ab is None else d_weight * keep_ab
        d_scores = materialize(weight * (d_weight - delta[:, :, :, a:b])).astype(low)
        kept = (weight if keep_ab is None else weight * keep_ab).astype(low)
        dq.append(
            jnp.einsum(
                "BKGTS,BKSC->BKGTC", d_scores, k[:, :, :s], preferred_element_type=jnp.float32
            )
        )
        rest = ((0, 0), (0, 0), (0, k.shape[2] - s), (0, 0))
        dk += jnp.pad(
            jnp.einsum("BKGTS,BKGTC->BKSC", d_scores, q_ab, preferred_element_type=jnp.float32),
            rest,
        )
        dv += jnp.pad(
            jnp.einsum("BKGTS,BKGTC->BKSC", kept, g_ab, preferred_element_type=jnp.float32), rest
        )
    dq = jnp.concatenate(dq, 3).transpose(0, 3, 1, 2, 4) * q.shape[-1] ** -0.5
    return (
        dq.astype(low),
        dk.transpose(0, 2, 1, 3).astype(low),
        dv.transpose(0, 2, 1, 3).astype(low),
        None,
        None,
    )


_xla.defvjp(_xla_forward, _xla_backward)
