"""Attention: one mask specification, and the backends that honour it.

q [B, T, K, G, C] (K key/value heads, G query heads on each), k and v [B, S, K, C] -> [B, T, K, G, C].
`reference` is the definition. `xla` is the same, several times faster to train on a CPU; both hold all B*H*T*S weights. `blockwise` holds one block of keys at a time, forward and backward,
so its memory is linear in S. To add a backend, write a function of the same form and add it to `BACKENDS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import products

Array = jax.Array
_MASKED = -1e30  # finite: exp underflows to an exact 0, and no NaN arises from a block without a visible key


@jax.custom_vjp
def _fence(x: Array) -> Array:
    return jax.lax.optimization_barrier(x)


_fence.defvjp(lambda x: (_fence(x), None), lambda _, g: (jax.lax.optimization_barrier(g),))


def fence(x: Array) -> Array:
    """x, computed once, forward and backward. XLA:CPU would otherwise fuse x into each of its readers and compute it again in
    every one; measured in experiments/LOG.md. On accelerators fusion is what one wants, and this does nothing."""
    return _fence(x) if jax.default_backend() == "cpu" else x


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q_index", "q_segments", "k_segments"], meta_fields=["window"])
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query sees key s when s <= its own index, in its own segment, and less than `window` back (0: any distance).

    q_index [B or 1, T]: the slot of each query among the keys; slots of a cache past it are not filled yet.
    q_segments [B, T], k_segments [B, S]: document numbers, both or neither.
    """

    q_index: Array
    q_segments: Array | None = None
    k_segments: Array | None = None
    window: int = 0

    def allowed(self, k_start: Any, k_size: int) -> Array:
        """bool [B or 1, T, k_size] for the keys [k_start, k_start + k_size)."""
        slots = k_start + jnp.arange(k_size, dtype=jnp.int32)[None, None, :]
        q = self.q_index[:, :, None]
        visible = slots <= q
        if self.window:
            visible &= slots > q - self.window
        if self.q_segments is not None and self.k_segments is not None:
            keys = jax.lax.dynamic_slice_in_dim(self.k_segments, k_start, k_size, axis=1)
            visible &= self.q_segments[:, :, None] == keys[:, None, :]
        return visible


def reference(q_BTKGC: Array, k_BSKC: Array, v_BSKC: Array, mask: Mask, *, block: int = 0, keep: Array | None = None) -> Array:
    """The definition, differentiated by JAX. keep [B, K, G, T, S]: dropout's multiplier of the weights, in every backend."""
    scores_BKGTS = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32) * q_BTKGC.shape[-1] ** -0.5
    allowed_BTS = mask.allowed(0, k_BSKC.shape[1])
    probs_BKGTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None, None], scores_BKGTS, _MASKED), axis=-1)
    probs_BKGTS = probs_BKGTS if keep is None else probs_BKGTS * keep
    return jnp.einsum("BKGTS,BSKC->BTKGC", probs_BKGTS.astype(v_BSKC.dtype), v_BSKC)


def xla(q_BTKGC: Array, k_BSKC: Array, v_BSKC: Array, mask: Mask, *, block: int = 0, keep: Array | None = None) -> Array:
    """The same with a hand-written gradient: heads first, queries in up to four strips that skip the keys after them, and the
    division by the softmax's sum moved from the [T, S] weights to the [T, C] outputs. float32 softmax."""
    allowed = mask.allowed(0, k_BSKC.shape[1])[:, None, None]
    return _xla(q_BTKGC, k_BSKC, v_BSKC, allowed, keep)


def _strips(t: int, s: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, keys they can see). Queries that continue a cache may see all of it."""
    n = min(4, t // 128) if t == s else 1
    return [(i * t // n, (i + 1) * t // n, (i + 1) * t // n) for i in range(n)] if n > 1 else [(0, t, s)]


@jax.custom_vjp
def _xla(q: Array, k: Array, v: Array, allowed: Array, keep: Array | None) -> Array:
    return _xla_forward(q, k, v, allowed, keep)[0]


def _xla_forward(q: Array, k: Array, v: Array, allowed: Array, keep: Array | None):
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (fence(x) for x in (q.transpose(0, 2, 3, 1, 4) * scale, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
    outs, weights, inverses = [], [], []
    for a, b, s in _strips(q.shape[3], k.shape[2]):
        scores = fence(jnp.einsum("BKGTC,BKSC->BKGTS", q[:, :, :, a:b], k[:, :, :s], preferred_element_type=jnp.float32))
        scores = jnp.where(allowed[:, :, :, a:b, :s], scores, _MASKED)
        weight = fence(jnp.exp(scores - scores.max(-1, keepdims=True)))
        inverse = 1 / weight.sum(-1, keepdims=True)
        kept = weight if keep is None else weight * keep[:, :, :, a:b, :s]
        out = jnp.einsum("BKGTS,BKSC->BKGTC", kept.astype(v.dtype), v[:, :, :s], preferred_element_type=jnp.float32)
        outs.append(out * inverse)
        weights.append(weight)
        inverses.append(inverse)
    out = fence(jnp.concatenate(outs, 3).transpose(0, 3, 1, 2, 4).astype(v.dtype))
    return out, (q, k, v, keep, out, weights, jnp.concatenate(inverses, 3))


def _xla_backward(saved: tuple, g: Array):
    q, k, v, keep, out, weights, inverse = saved
    g = g.astype(jnp.float32)
    delta = (g * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)[..., None]
    g, delta = fence(g.transpose(0, 2, 3, 1, 4) * inverse), fence(delta * inverse)  # gradients over the softmax's sum
    low, dk, dv = v.dtype, jnp.zeros(k.shape), jnp.zeros(v.shape)
    dq = []
    for (a, b, s), weight in zip(_strips(q.shape[3], k.shape[2]), weights, strict=True):
        keep_ab = None if keep is None else keep[:, :, :, a:b, :s]
        q_ab, g_ab = q[:, :, :, a:b], g[:, :, :, a:b].astype(low)
        d_weight = fence(jnp.einsum("BKGTC,BKSC->BKGTS", g_ab, v[:, :, :s], preferred_element_type=jnp.float32))
        d_weight = d_weight if keep_ab is None else d_weight * keep_ab
        d_scores = fence(weight * (d_weight - delta[:, :, :, a:b])).astype(low)
        kept = (weight if keep_ab is None else weight * keep_ab).astype(low)
        dq.append(jnp.einsum("BKGTS,BKSC->BKGTC", d_scores, k[:, :, :s], preferred_element_type=jnp.float32))
        rest = ((0, 0), (0, 0), (0, k.shape[2] - s), (0, 0))
        dk += jnp.pad(jnp.einsum("BKGTS,BKGTC->BKSC", d_scores, q_ab, preferred_element_type=jnp.float32), rest)
        dv += jnp.pad(jnp.einsum("BKGTS,BKGTC->BKSC", kept, g_ab, preferred_element_type=jnp.float32), rest)
    dq = jnp.concatenate(dq, 3).transpose(0, 3, 1, 2, 4) * q.shape[-1] ** -0.5
    return dq.astype(low), dk.transpose(0, 2, 1, 3).astype(low), dv.transpose(0, 2, 1, 3).astype(low), None, None


_xla.defvjp(_xla_forward, _xla_backward)


def blockwise(q_BTKGC: Array, k_BSKC: Array, v_BSKC: Array, mask: Mask, *, block: int = 256, keep: Array | None = None) -> Array:
    """Online softmax over blocks of keys (Rabe & Staats 2021; Dao et al. 2022), recomputed block by block in the backward pass."""
    if keep is not None:
        raise ValueError("blockwise attention has no dropout on its weights: use model.attention = 'xla' or model.dropout = 0")
    size = min(block, k_BSKC.shape[1])
    pad = -k_BSKC.shape[1] % size
    if pad:  # padded slots lie past every query, so the causal rule hides them
        k_BSKC, v_BSKC = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k_BSKC, v_BSKC))
        if mask.k_segments is not None:
            mask = dataclasses.replace(mask, k_segments=jnp.pad(mask.k_segments, ((0, 0), (0, pad))))
    return _blockwise(size, q_BTKGC, k_BSKC, v_BSKC, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(block: int, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return _blockwise_forward(block, q, k, v, mask)[0]


def _block_scores(block: int, i: Array, q: Array, k: Array, mask: Mask) -> Array:
    """Masked scores [B, K, G, T, block] of key block i, float32."""
    k_i = jax.lax.dynamic_slice_in_dim(k, i * block, block, axis=1)
    scores = jnp.einsum("BTKGC,BSKC->BKGTS", q, k_i, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(mask.allowed(i * block, block)[:, None, None], scores, _MASKED)


def _blockwise_forward(block: int, q: Array, k: Array, v: Array, mask: Mask):
    b, t, heads, groups, c = q.shape

    def body(carry, i):
        peak, total, out = carry
        scores = _block_scores(block, i, q, k, mask)
        new_peak = jnp.maximum(peak, scores.max(-1))
        keep = jnp.exp(peak - new_peak)
        probs = jnp.exp(scores - new_peak[..., None])
        v_i = jax.lax.dynamic_slice_in_dim(v, i * block, block, axis=1)
        partial = jnp.einsum("BKGTS,BSKC->BKGTC", probs.astype(v.dtype), v_i, preferred_element_type=jnp.float32)
        return (new_peak, total * keep + probs.sum(-1), out * keep[..., None] + partial), None

    # _MASKED / 2: above every masked score, so that a block in which a query sees nothing adds exact zeros
    start = (jnp.full((b, heads, groups, t), _MASKED / 2), jnp.zeros((b, heads, groups, t)), jnp.zeros((b, heads, groups, t, c)))
    (peak, total, out), _ = jax.lax.scan(body, start, jnp.arange(k.shape[1] // block))
    result = jnp.einsum("BKGTC->BTKGC", out / total[..., None]).astype(q.dtype)
    return result, (q, k, v, mask, result, peak + jnp.log(total))


def _blockwise_backward(block: int, saved, d_out: Array):
    q, k, v, mask, out, log_total = saved
    scale = q.shape[-1] ** -0.5
    d_out = d_out.astype(jnp.float32)
    delta = jnp.einsum("BTKGC,BTKGC->BKGT", d_out, out.astype(jnp.float32))

    def body(dq, i):
        probs = jnp.exp(_block_scores(block, i, q, k, mask) - log_total[..., None])
        k_i, v_i = (jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1).astype(jnp.float32) for x in (k, v))
        d_scores = probs * (jnp.einsum("BTKGC,BSKC->BKGTS", d_out, v_i) - delta[..., None]) * scale
        dk_i = jnp.einsum("BKGTS,BTKGC->BSKC", d_scores, q.astype(jnp.float32))
        dv_i = jnp.einsum("BKGTS,BTKGC->BSKC", probs, d_out)
        return dq + jnp.einsum("BKGTS,BSKC->BTKGC", d_scores, k_i), (dk_i, dv_i)

    dq, blocks = jax.lax.scan(body, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[1] // block))
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k.shape) for x in blocks)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def write_cache(cache: dict[str, Array], k_BTKC: Array, v_BTKC: Array, start_B: Array) -> dict[str, Array]:
    """One layer of `model.init_cache` with the slots [start, start + T) of each row replaced. The caller makes sure that they exist: XLA would move
    them back."""
    b, _, heads, _ = k_BTKC.shape

    def put(old: Array, new: Array, axis: int) -> Array:
        """old [B * K, ...]; new [B, K, ...], whose slots are on that axis of `old`."""
        new = fence(new.astype(old.dtype))  # a layout of its own, or the whole cache would take that of the new rows
        if b > 32:
            one = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=axis)
            return jax.vmap(one)(old.reshape(b, heads, *old.shape[1:]), new, start_B).reshape(old.shape)
        for i in range(b):  # in place; the batched form is a scatter, slow on a CPU
            index: list[Any] = [i * heads, *[0] * (old.ndim - 1)]
            index[axis] = start_B[i]
            old = jax.lax.dynamic_update_slice(old, new[i], index)
        return old

    result = {}
    for name, new in (("k", k_BTKC.swapaxes(1, 2)), ("v", v_BTKC.swapaxes(1, 2))):
        if f"{name}_scale" in cache:  # one scale per slot and head
            scale = jnp.maximum(jnp.abs(new).max(-1).astype(jnp.float32) / 127, 1e-30)
            new = jnp.round(new / scale[..., None])
            result[f"{name}_scale"] = put(cache[f"{name}_scale"], scale, 1)
        result[name] = put(cache[name], new, 1) if name == "k" else put(cache[name], new.swapaxes(2, 3), 2)
    return result


def cached(q_BTKGC: Array, cache: dict[str, Array], mask: Mask) -> Array:
    """Attention over one layer of `model.init_cache`, as `reference` defines it; N = B * K, Q = T * G. int8 is scaled after the products."""
    b, t, heads, groups, width = q_BTKGC.shape
    slots = cache["k"].shape[1]

    def product(x_NQD: Array, rows_NFD: Array) -> Array:
        if t * groups <= products.FEW and jax.default_backend() == "cpu":
            return products.few_rows(x_NQD, fence(rows_NFD))
        return jnp.einsum("NQD,NFD->NQF", x_NQD.astype(q_BTKGC.dtype), rows_NFD.astype(q_BTKGC.dtype), preferred_element_type=jnp.float32)

    q_NQC = q_BTKGC.transpose(0, 2, 1, 3, 4).reshape(b * heads, t * groups, width)
    scores_NQS = product(q_NQC, cache["k"]) * width**-0.5
    if "k_scale" in cache:
        scores_NQS = scores_NQS * cache["k_scale"][:, None]
    scores_BKTGS = jnp.where(mask.allowed(0, slots)[:, None, :, None], scores_NQS.reshape(b, heads, t, groups, slots), _MASKED)
    probs_NQS = jax.nn.softmax(scores_BKTGS, axis=-1).reshape(b * heads, t * groups, slots)
    if "v_scale" in cache:
        probs_NQS = probs_NQS * cache["v_scale"][:, None]
    y_NQC = product(probs_NQS, cache["v"]).astype(q_BTKGC.dtype)
    return y_NQC.reshape(b, heads, t, groups, width).transpose(0, 2, 1, 3, 4)


BACKENDS: dict[str, Callable[..., Array]] = {"reference": reference, "xla": xla, "blockwise": blockwise}
