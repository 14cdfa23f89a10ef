"""One layer of the key/value cache (`model.kv_cache.init_cache`): written, and attended over.

Where a layer also has `row` (int32 []), a call is about B neighbouring rows of a larger cache:
those from `row` on. Where it has `used` (int32 [B]) too, the slots that each of them uses,
attention goes over the blocks of slots up to the last one that is used, with a softmax that is
carried on from block to block (Milakov & Gimelshein 2018).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.ops.activation import softcap as cap_softly
from gptjax.ops.attention.mask import MASKED, Mask
from gptjax.ops.layer_loop import while_loop
from gptjax.ops.materialize import Barrier, kept, unchanged
from gptjax.ops.products import FEW, Part, row_sum, small_batch_matmul

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

    def product(x_NQD: Array, rows: Array, part: Part) -> Array:
        shape = (len(x_NQD), part.rows or rows.shape[1], x_NQD.shape[2])
        own_NFD = part.read(rows, 0, shape).astype(q_BTKGC.dtype)
        x = x_NQD.astype(q_BTKGC.dtype)
        return jnp.einsum("NQD,NFD->NQF", x, own_NFD, preferred_element_type=jnp.float32)

    attend = _attend_by_blocks if "used" in cache else _attend
    return attend(product, q_BTKGC, cache, mask, softcap)


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
    attend = _attend_by_blocks if "used" in cache else _attend
    return attend(small_batch_matmul, q_BTKGC, cache, mask, softcap)


def _attend(
    product: Any, q_BTKGC: Array, cache: dict[str, Array], mask: Mask, softcap: float
) -> Array:
    """N = B * K, Q = T * G. int8 keys and values are scaled after the products."""
    b, t, heads, groups, _ = q_BTKGC.shape
    slots, own = cache["k"].shape[1], Part(cache.get("row", 0) * heads)
    q_NQC = _by_heads(q_BTKGC)
    scores_NQS = product(q_NQC, cache["k"], own) * q_NQC.shape[-1] ** -0.5
    if "k_scale" in cache:
        scores_NQS = scores_NQS * _scales(cache["k_scale"], own.first, 0, (len(q_NQC), slots))
    scores_NQS = cap_softly(scores_NQS, softcap)
    scores_BKTGS = scores_NQS.reshape(b, heads, t, groups, slots)
    visible = mask.allowed(0, slots)[:, None, :, None]
    probs_BKTGS = jax.nn.softmax(jnp.where(visible, scores_BKTGS, MASKED), axis=-1)
    probs_NQS = probs_BKTGS.reshape(scores_NQS.shape)
    if "v_scale" in cache:
        probs_NQS = probs_NQS * _scales(cache["v_scale"], own.first, 0, (len(q_NQC), slots))
    return _by_texts(product(probs_NQS, cache["v"], own), q_BTKGC)


def _by_heads(x_BTKGC: Array) -> Array:
    """[B * K, T * G, C]."""
    b, t, heads, groups, width = x_BTKGC.shape
    return x_BTKGC.transpose(0, 2, 1, 3, 4).reshape(b * heads, t * groups, width)


def _by_texts(y_NQC: Array, like_BTKGC: Array) -> Array:
    """The opposite, in the dtype of the queries."""
    b, t, heads, groups, width = like_BTKGC.shape
    y_BKTGC = y_NQC.astype(like_BTKGC.dtype).reshape(b, heads, t, groups, width)
    return y_BKTGC.transpose(0, 2, 1, 3, 4)


def _scales(array: Array, first: Array | int, slot: Array | int, shape: tuple[int, int]) -> Array:
    """[N, 1, S] of int8 keys or values."""
    return jax.lax.dynamic_slice(array, (first, slot), shape)[:, None]


BLOCK = 128  # slots; those of a cache with `used` are a multiple


def _attend_by_blocks(
    product: Any, q_BTKGC: Array, cache: dict[str, Array], mask: Mask, softcap: float
) -> Array:
    """The same for the rows from `row` on, over as many blocks as the longest of them has.

    What a row gets has the same bits for any number of rows: its sums have one order, and a block
    in which it has nothing changes nothing.
    """
    b, t, heads, groups, width = q_BTKGC.shape
    first, q_NQC = cache["row"] * heads, _by_heads(q_BTKGC)
    count, queries = q_NQC.shape[:2]
    blocks = (cache["used"].max() + BLOCK - 1) // BLOCK

    def add_block(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        i, peak_NQ, total_NQC, y_NQC = carry
        at, shape = i * BLOCK, (count, BLOCK)
        scores_NQS = product(q_NQC, cache["k"], Part(first, row=at, rows=BLOCK)) * width**-0.5
        if "k_scale" in cache:
            scores_NQS = scores_NQS * _scales(cache["k_scale"], first, at, shape)
        visible_BTS = mask.allowed(at, BLOCK)
        visible = jnp.broadcast_to(
            visible_BTS[:, None, :, None], (b, heads, t, groups, BLOCK)
        ).reshape(scores_NQS.shape)
        scores_NQS = kept(jnp.where(visible, cap_softly(scores_NQS, softcap), MASKED))
        new_peak_NQ = jnp.maximum(peak_NQ, scores_NQS.max(-1))
        # Exponentials and sums are of numbers in memory, and exponentials as wide as y: fused with
        # what gives them, or of a single number, they are rounded otherwise.
        probs_NQS = jnp.exp(kept(scores_NQS - new_peak_NQ[..., None]))
        probs_NQS = kept(jnp.where(visible, probs_NQS, 0.0))
        sunk_NQC = jnp.broadcast_to((peak_NQ - new_peak_NQ)[..., None], y_NQC.shape)
        shrink_NQC = kept(jnp.exp(kept(sunk_NQC)))
        sum_NQC = kept(jnp.broadcast_to(row_sum(probs_NQS)[..., None], y_NQC.shape))
        total_NQC = total_NQC * shrink_NQC + sum_NQC
        if "v_scale" in cache:
            probs_NQS = probs_NQS * _scales(cache["v_scale"], first, at, shape)
        update_NQC = product(probs_NQS, cache["v"], Part(first, column=at))
        return i + 1, new_peak_NQ, total_NQC, y_NQC * shrink_NQC + update_NQC

    start = (
        jnp.int32(0),
        jnp.full((count, queries), MASKED),
        jnp.zeros((count, queries, width)),
        jnp.zeros((count, queries, width)),
    )
    _, _, total_NQC, y_NQC = while_loop(lambda carry: carry[0] < blocks, add_block, start)
    return _by_texts(y_NQC / jnp.maximum(total_NQC, 1e-30), q_BTKGC)
