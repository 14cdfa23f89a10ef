"""One layer of the key/value cache (`model.kv_cache.init_cache`): written, and attended over.

Where a layer also has `row` (int32 []), a call is about B neighbouring rows of a larger cache:
those from `row` on. Where it has `used` (int32 [B]) too, attention goes over blocks of a row's
first `used` slots, with a softmax that is carried on from block to block (Milakov & Gimelshein
2018).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.ops.activation import softcap as cap_softly
from gptjax.ops.attention.mask import MASKED, Mask
from gptjax.ops.materialize import Barrier, materialize, unchanged
from gptjax.ops.products import FEW, row_sum, small_batch_matmul

PLACES = ("row", "used")  # of a layer, what is no array of keys and values


def write_cache(
    cache: dict[str, Array],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    start_B: Int[Array, " B_or_1"],
    *,
    barrier: Barrier = unchanged,
) -> dict[str, Array]:
    """The layer with the slots [start, start + T) of each row replaced.

    The caller makes sure that these slots exist: XLA would move them back.
    """
    result: dict[str, Array] = {name: cache[name] for name in cache if name in PLACES}
    put = functools.partial(_put, start_B=start_B, first=cache.get("row"), barrier=barrier)
    if "used" in cache:
        # Another text may come to these slots, whose mask gives what is left here the weight 0, and
        # 0 * nan is nan. Its own text still meets the nan in the keys.
        v_BTKC = jnp.where(jnp.isfinite(v_BTKC), v_BTKC, 0)
    for name, new in (("k", k_BTKC.swapaxes(1, 2)), ("v", v_BTKC.swapaxes(1, 2))):
        if f"{name}_scale" in cache:  # int8: one scale per slot and head
            scale = jnp.maximum(jnp.abs(new).max(-1).astype(jnp.float32) / 127, 1e-30)
            new = jnp.round(new / scale[..., None])
            old = cache[f"{name}_scale"]
            result[f"{name}_scale"] = barrier(put(old, scale, axis=1))
        if name == "v":
            new = new.swapaxes(2, 3)
        axis = 1 if name == "k" else 2
        # who reads it and who writes to it next have one array: XLA would make a copy for each
        result[name] = barrier(put(cache[name], new, axis=axis))
    return result


def _put(
    old: Array,
    new: Array,
    *,
    start_B: Array,
    axis: int,
    first: Array | None,
    barrier: Barrier,
) -> Array:
    """old [B * K, ...] with new [B, K, ...] at the slots from start on, on that axis of `old`; of
    a larger `old`, in its rows from `first` on."""
    b, heads = new.shape[:2]
    # a layout of its own, or the whole cache would take that of the new rows
    new = barrier(new.astype(old.dtype))
    if b > 32 and first is None:
        rows = old.reshape(b, heads, *old.shape[1:])
        put = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=axis)
        return jax.vmap(put)(rows, new, start_B).reshape(old.shape)

    def put_row(i: Any, old: Array) -> Array:  # in place; the batched form copies a larger cache
        row = i if first is None else first + i
        index: list[Any] = [row * heads, *[0] * (old.ndim - 1)]
        index[axis] = start_B[i]
        return jax.lax.dynamic_update_slice(old, new[i], index)

    if b > 32:
        return jax.lax.fori_loop(0, b, put_row, old)
    for i in range(b):
        old = put_row(i, old)
    return old


def cached_attention(
    q_BTKGC: Float[Array, "B T K G C"],
    cache: dict[str, Array],
    mask: Mask,
    *,
    softcap: float = 0.0,
) -> Float[Array, "B T K G C"]:
    """Attention over one layer of the cache, as `reference` defines it, [B, T, K, G, C]."""

    def product(x_NQD: Array, rows_NFD: Array, first: Array | None = None) -> Array:
        own = _own(rows_NFD, first, len(x_NQD))
        x, rows = x_NQD.astype(q_BTKGC.dtype), own.astype(q_BTKGC.dtype)
        return jnp.einsum("NQD,NFD->NQF", x, rows, preferred_element_type=jnp.float32)

    attend = _attend_by_blocks if "used" in cache else _attend
    return attend(product, q_BTKGC, cache, mask, softcap)


def _own(array: Array, first: Array | None, count: int) -> Array:
    """Of a larger cache's array, so many entries from one on."""
    return array if first is None else jax.lax.dynamic_slice_in_dim(array, first, count)


def cached_attention_cpu(
    q_BTKGC: Float[Array, "B T K G C"],
    cache: dict[str, Array],
    mask: Mask,
    *,
    softcap: float = 0.0,
) -> Float[Array, "B T K G C"]:
    """The same; few queries a head at the speed of reading the cache."""
    if q_BTKGC.shape[1] * q_BTKGC.shape[3] > FEW:
        return cached_attention(q_BTKGC, cache, mask, softcap=softcap)
    if "used" in cache:
        return _attend_by_blocks(small_batch_matmul, q_BTKGC, cache, mask, softcap)
    return _attend(small_batch_matmul, q_BTKGC, cache, mask, softcap)


def _attend(
    product: Any, q_BTKGC: Array, cache: dict[str, Array], mask: Mask, softcap: float
) -> Array:
    """N = B * K, Q = T * G. int8 keys and values are scaled after the products."""
    b, t, heads, groups, width = q_BTKGC.shape
    slots, count = cache["k"].shape[1], b * heads
    first = cache["row"] * heads if "row" in cache else None
    q_NQC = q_BTKGC.transpose(0, 2, 1, 3, 4).reshape(count, t * groups, width)
    scores_NQS = product(q_NQC, cache["k"], first) * width**-0.5
    if "k_scale" in cache:
        scores_NQS = scores_NQS * _own(cache["k_scale"], first, count)[:, None]
    scores_NQS = cap_softly(scores_NQS, softcap)
    scores_BKTGS = scores_NQS.reshape(b, heads, t, groups, slots)
    visible = mask.allowed(0, slots)[:, None, :, None]
    probs_BKTGS = jax.nn.softmax(jnp.where(visible, scores_BKTGS, MASKED), axis=-1)
    probs_NQS = probs_BKTGS.reshape(count, t * groups, slots)
    if "v_scale" in cache:
        probs_NQS = probs_NQS * _own(cache["v_scale"], first, count)[:, None]
    y_NQC = product(probs_NQS, cache["v"], first).astype(q_BTKGC.dtype)
    return y_NQC.reshape(b, heads, t, groups, width).transpose(0, 2, 1, 3, 4)


BLOCK = 256  # slots; those of a cache with `used` are a multiple


def _attend_by_blocks(
    product: Any, q_BTKGC: Array, cache: dict[str, Array], mask: Mask, softcap: float
) -> Array:
    """The same for the rows from `row` on, each over its first `used` slots.

    Row after row, so that the loop's body, and with it the order of all sums, is the same for any
    number of rows. The rows are in two halves, which a CPU may compute at the same time.
    """
    b, t, heads, groups, width = q_BTKGC.shape
    q_NQC = q_BTKGC.transpose(0, 2, 1, 3, 4).reshape(b * heads, t * groups, width)
    half = -(-b // 2)
    parts = []
    for start in range(0, b, half):
        rows = range(start, min(start + half, b))
        parts.append(_attend_rows(product, q_NQC, cache, mask, softcap, heads, rows))
    y_NQC = jnp.concatenate(parts).astype(q_BTKGC.dtype)
    return y_NQC.reshape(b, heads, t, groups, width).transpose(0, 2, 1, 3, 4)


def _attend_rows(
    product: Any,
    q_NQC: Array,
    cache: dict[str, Array],
    mask: Mask,
    softcap: float,
    heads: int,
    rows: range,
) -> Array:
    """float32 [rows * K, Q, C]."""
    _, queries, width = q_NQC.shape

    def attend(r: Array, y_NQC: Array) -> Array:
        q_KQC = jax.lax.dynamic_slice_in_dim(q_NQC, (rows.start + r) * heads, heads)
        index = jax.lax.dynamic_slice_in_dim(mask.q_index, rows.start + r, 1)
        own_mask = dataclasses.replace(mask, q_index=index)
        row = cache["row"] + rows.start + r

        def add_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak_KQ, total_KQ, y_KQC = carry
            block = functools.partial(_block, cache, row * heads, heads, i)
            scores_KQS = product(q_KQC, block("k", 1)) * width**-0.5
            if "k_scale" in cache:
                scores_KQS = scores_KQS * block("k_scale", 1)[:, None]
            visible = own_mask.allowed(i * BLOCK, BLOCK)[0]  # [T, S]
            visible = jnp.repeat(visible, queries // len(visible), 0)[None]  # [1, Q, S]
            scores_KQS = jnp.where(visible, cap_softly(scores_KQS, softcap), MASKED)
            new_peak_KQ = jnp.maximum(peak_KQ, scores_KQS.max(-1))
            probs_KQS = jnp.where(visible, jnp.exp(scores_KQS - new_peak_KQ[..., None]), 0.0)
            probs_KQS = materialize(probs_KQS)
            shrink_KQ = jnp.where(new_peak_KQ > peak_KQ, jnp.exp(peak_KQ - new_peak_KQ), 1.0)
            total_KQ = total_KQ * shrink_KQ + row_sum(probs_KQS)
            if "v_scale" in cache:
                probs_KQS = probs_KQS * block("v_scale", 1)[:, None]
            y_KQC = y_KQC * shrink_KQ[..., None] + product(probs_KQS, block("v", 2))
            return new_peak_KQ, total_KQ, y_KQC

        start = (
            jnp.full((heads, queries), MASKED),
            jnp.zeros((heads, queries)),
            jnp.zeros((heads, queries, width)),
        )
        blocks = (cache["used"][rows.start + r] + BLOCK - 1) // BLOCK
        _, total_KQ, y_KQC = jax.lax.fori_loop(0, blocks, add_block, start)
        y_KQC = y_KQC / jnp.maximum(total_KQ, 1e-30)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(y_NQC, y_KQC, r * heads, 0)

    # how many rows there are is no constant for the compiler, which would unroll a loop over one
    count = jnp.minimum(len(rows), cache["used"].sum() + len(rows))
    y_NQC = jnp.zeros((len(rows) * heads, queries, width))
    return jax.lax.fori_loop(0, count, attend, y_NQC)


def _block(
    cache: dict[str, Array], first: Array, heads: int, i: Array, name: str, axis: int
) -> Array:
    """Block i of the slots, which are that axis, of the heads from `first` on."""
    start: list[Any] = [first, *[0] * (cache[name].ndim - 1)]
    size = [heads, *cache[name].shape[1:]]
    start[axis], size[axis] = i * BLOCK, BLOCK
    return jax.lax.dynamic_slice(cache[name], start, size)
