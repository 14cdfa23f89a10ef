"""TODO docstring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops import products
from gptjax.ops.attention.mask import MASKED, Mask
from gptjax.ops.materialize import materialize


def write_cache(
    cache: dict[str, Array], k_BTKC: Array, v_BTKC: Array, start_B: Array
) -> dict[str, Array]:
    """One layer of `model.init_cache` with the slots [start, start + T) of each row replaced. The caller makes sure that they exist: XLA would move
    them back."""
    b, _, heads, _ = k_BTKC.shape

    def put(old: Array, new: Array, axis: int) -> Array:
        """old [B * K, ...]; new [B, K, ...], whose slots are on that axis of `old`."""
        new = materialize(
            new.astype(old.dtype)
        )  # a layout of its own, or the whole cache would take that of the new rows
        if b > 32:
            one = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=axis)
            return jax.vmap(one)(old.reshape(b, heads, *old.shape[1:]), new, start_B).reshape(
                old.shape
            )
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
        result[name] = (
            put(cache[name], new, 1) if name == "k" else put(cache[name], new.swapaxes(2, 3), 2)
        )
    return result


def cached_attention(q_BTKGC: Array, cache: dict[str, Array], mask: Mask) -> Array:
    """Attention over one layer of `model.init_cache`, as `reference` defines it; N = B * K, Q = T * G. int8 is scaled after the products."""
    b, t, heads, groups, width = q_BTKGC.shape
    slots = cache["k"].shape[1]

    def product(x_NQD: Array, rows_NFD: Array) -> Array:
        if t * groups <= products.FEW and jax.default_backend() == "cpu":
            return products.small_batch_matmul(x_NQD, materialize(rows_NFD))
        return jnp.einsum(
            "NQD,NFD->NQF",
            x_NQD.astype(q_BTKGC.dtype),
            rows_NFD.astype(q_BTKGC.dtype),
            preferred_element_type=jnp.float32,
        )

    q_NQC = q_BTKGC.transpose(0, 2, 1, 3, 4).reshape(b * heads, t * groups, width)
    scores_NQS = product(q_NQC, cache["k"]) * width**-0.5
    if "k_scale" in cache:
        scores_NQS = scores_NQS * cache["k_scale"][:, None]
    scores_BKTGS = jnp.where(
        mask.allowed(0, slots)[:, None, :, None],
        scores_NQS.reshape(b, heads, t, groups, slots),
        MASKED,
    )
    probs_NQS = jax.nn.softmax(scores_BKTGS, axis=-1).reshape(b * heads, t * groups, slots)
    if "v_scale" in cache:
        probs_NQS = probs_NQS * cache["v_scale"][:, None]
    y_NQC = product(probs_NQS, cache["v"]).astype(q_BTKGC.dtype)
    return y_NQC.reshape(b, heads, t, groups, width).transpose(0, 2, 1, 3, 4)
