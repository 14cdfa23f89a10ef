"""Attention on TPUs by JAX's splash kernels: flash attention that skips the blocks nobody sees.

The kernels ask, for each block of queries, which blocks of keys it runs over. Those tables follow
here from the slots of the queries, which may be traced: so a shard of a row's queries is the same
program at every offset, and a row of 131,072 costs no time on the host. JAX's own functions would
walk through the T x S mask in NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.ops.attention.mask import SAVED_NAME, Mask
from gptjax.ops.attention.reference import reference

LANES = 128  # lengths are padded to a multiple of it
# The side of a block of queries and of keys: what MaxText sets for every kernel in its base.yml
# (sa_block_q, sa_block_kv, ...).
BLOCK = 512
NO_DOCUMENT = -1


def splash(
    q_BTKGC: Float[Array, "B T K G C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    mask: Mask,
    *,
    block: int = 0,
    dropout_BKGTS: Float[Array, "B K G T S"] | None = None,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B T K G C"]:
    """As `reference`, with memory linear in T. The mask's q_index is [1, T] and rises by one.

    interpret: run the kernels as plain JAX, on a CPU. Raises ValueError for dropout, which the
    kernels have not.
    """
    if dropout_BKGTS is not None:
        raise ValueError(
            "splash attention has no dropout on its weights: "
            "use model.attention = 'xla' or model.dropout = 0"
        )
    if mask.q_index.shape[0] != 1:
        raise ValueError(
            f"splash attention takes rows at one offset, not q_index {mask.q_index.shape}: "
            "use model.attention = 'blockwise'"
        )
    b, t, heads, groups, c = q_BTKGC.shape
    if t == k_BSKC.shape[1] == 1:  # a row of one token: nothing that kernels are for
        return reference(q_BTKGC, k_BSKC, v_BSKC, mask, softcap=softcap)
    blocks, padding = zip(*(_blocks(n) for n in (t, k_BSKC.shape[1])), strict=True)
    scaled = (q_BTKGC.astype(jnp.float32) * c**-0.5).astype(q_BTKGC.dtype)
    q_BHTC = scaled.transpose(0, 2, 3, 1, 4).reshape(b, heads * groups, t, c)
    q_BHTC = jnp.pad(q_BHTC, ((0, 0), (0, 0), (0, padding[0]), (0, 0)))
    k_BKSC, v_BKSC = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding[1]), (0, 0)))
        for x in (k_BSKC, v_BSKC)
    )
    kernel = _kernel(mask, blocks, padding, k_BSKC.shape[1], softcap, interpret)
    y_BHTC = jax.vmap(kernel)(q_BHTC, k_BKSC, v_BKSC, _segment_ids(mask, padding))
    y_BTHC = y_BHTC[:, :, :t].transpose(0, 2, 1, 3)
    return y_BTHC.reshape(q_BTKGC.shape)


def _blocks(length: int) -> tuple[int, int]:
    """The side of a block, a multiple of `LANES`, and by how much the length is padded."""
    number = -(-length // BLOCK)
    side = -(-length // (number * LANES)) * LANES
    return side, number * side - length


def _segment_ids(mask: Mask, padding: tuple[int, ...]) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    if mask.q_segments is None or mask.k_segments is None:
        return None
    q, k = (
        jnp.pad(x, ((0, 0), (0, more)), constant_values=NO_DOCUMENT)
        for x, more in zip((mask.q_segments, mask.k_segments), padding, strict=True)
    )
    return splash_attention.SegmentIds(q, k)


def _kernel(
    mask: Mask,
    blocks: tuple[int, ...],
    padding: tuple[int, ...],
    keys: int,
    softcap: float,
    interpret: bool,
) -> Any:
    """f(q [H, T, C], k [K, S, C], v, segment ids or None) -> [H, T, C], of padded arrays."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    q_side, k_side = blocks
    # padded queries see what the last one sees: with nothing to see, they would give NaN
    q_index = jnp.pad(mask.q_index[0], (0, padding[0]), mode="edge")
    first_seen = jnp.zeros_like(q_index)
    if mask.window:
        first_seen = jnp.maximum(q_index - mask.window + 1, 0)
        if mask.use_window is not None:
            first_seen = jnp.where(mask.use_window, first_seen, 0)
    low = first_seen.reshape(-1, q_side).min(1) // k_side  # blocks of keys of a block of queries
    high = q_index.reshape(-1, q_side).max(1) // k_side
    every = mask.window == 0 or mask.use_window is not None
    key_blocks = (keys + padding[1]) // k_side
    encoded: Any = q_index
    if mask.use_window is not None and mask.window:
        encoded = 2 * q_index + mask.use_window

    def info(tables: tuple[Array, Array]) -> MaskInfo:
        return MaskInfo(
            data_next=tables[0][None],
            block_mask=tables[1][None],
            mask_next=None,
            partial_mask_blocks=None,
            q_sequence=encoded,
        )

    of_queries = info(
        _key_tables(low, high, key_blocks if every else _touched(q_side, k_side, mask, key_blocks))
    )
    query_blocks = low.shape[0]
    of_keys = info(
        _query_tables(
            low,
            high,
            key_blocks,
            query_blocks if every else _touched(k_side, q_side, mask, query_blocks),
        )
    )
    return splash_attention_kernel.SplashAttentionKernel(
        of_queries,
        of_queries,
        of_keys,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=q_side,
            block_kv=k_side,
            block_kv_compute=k_side,
            block_q_dkv=q_side,
            block_kv_dkv=k_side,
            block_kv_dkv_compute=k_side,
            block_q_dq=q_side,
            block_kv_dq=k_side,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=SAVED_NAME,
        mask_function=_visible(mask.window, mask.use_window is not None),
        interpret=interpret,
    )


@functools.cache  # one object for each rule: the kernels are compiled again for another one
def _visible(window: int, alternating: bool) -> Callable[[Array, Array], Array]:
    """The rule of `Mask`, of the slots of queries and keys, as the kernels apply it."""

    def causal(q: Array, k: Array) -> Array:
        return k <= q

    def in_window(q: Array, k: Array) -> Array:
        return (k <= q) & (k > q - window)

    def by_layer(encoded: Array, k: Array) -> Array:  # 2 q, + 1 where the window holds
        q = encoded >> 1
        return (k <= q) & ((k > q - window) | ((encoded & 1) == 0))

    if not window:
        return causal
    return by_layer if alternating else in_window


def _touched(side: int, other_side: int, mask: Mask, number: int) -> int:
    """Of `number` blocks of other_side, how many one block of `side` can meet in a window."""
    return min(number, (side + mask.window - 3 + other_side) // other_side + 1)


def _key_tables(low: Array, high: Array, width: int) -> tuple[Array, Array]:
    """For each block of queries, [width] blocks of keys and whether they are run over.

    Those that are come first; the rest name the block that the next block of queries begins with,
    which is fetched meanwhile.
    """
    block = low[:, None] + jnp.arange(width, dtype=jnp.int32)
    run = block <= high[:, None]
    return jnp.where(run, block, jnp.roll(low, -1)[:, None]), run.astype(jnp.int32)


def _query_tables(low: Array, high: Array, key_blocks: int, width: int) -> tuple[Array, Array]:
    """For each block of keys, [width] blocks of queries and whether they are run over: [width, S].

    Those that are come last; the ones before name the first of them.
    """
    keys = jnp.arange(key_blocks, dtype=jnp.int32)
    first = (high[:, None] < keys).sum(0, dtype=jnp.int32)
    last = (low[:, None] <= keys).sum(0, dtype=jnp.int32) - 1
    block = last + 1 - width + jnp.arange(width, dtype=jnp.int32)[:, None]
    run = block >= first
    resting = jnp.clip(first, 0, low.shape[0] - 1)
    return jnp.where(run, block, resting), run.astype(jnp.int32)
