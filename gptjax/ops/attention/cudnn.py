"""Attention on GPUs by cuDNN's flash kernels, through `jax.nn.dot_product_attention`.

The kernels know causality, a window and grouped heads. Packed documents, and queries that are a
part of the keys (a context-parallel shard), reach them only as a mask of B x T x S numbers of 16
bits, the same for all heads; past `MASK_LIMIT` bytes it is refused.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gptjax.ops.attention.mask import SAVED_NAME, Mask
from gptjax.ops.attention.reference import reference

MASK_LIMIT = 2**30
WIDEST_HEAD = 128  # of every generation that has the kernels; 256 from Hopper on


def cudnn(
    q_BTKGC: Float[Array, "B T K G C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    mask: Mask,
    *,
    block: int = 0,
    dropout_BKGTS: Float[Array, "B K G T S"] | None = None,
    softcap: float = 0.0,
    implementation: Any = "cudnn",
) -> Float[Array, "B T K G C"]:
    """As `reference`. Where T = S, the queries stand at the slots 0 to T - 1.

    implementation: of `jax.nn.dot_product_attention`; "xla" computes the same on any platform, for
    tests. Raises ValueError for what the kernels have not: `fault`.
    """
    b, t, heads, groups, c = q_BTKGC.shape
    s = k_BSKC.shape[1]
    if t == s == 1:  # a row of one token: nothing that kernels are for
        return reference(q_BTKGC, k_BSKC, v_BSKC, mask, softcap=softcap)
    masked = mask_shape(b, t, s, packed=mask.q_segments is not None)
    message = fault(
        dtype=q_BTKGC.dtype.name if implementation == "cudnn" else "bfloat16",
        head_width=c,
        mask=masked,
        dropout=dropout_BKGTS is not None,
        softcap=softcap,
    )
    if message:
        raise ValueError(message)
    q_BTHC = q_BTKGC.reshape(b, t, heads * groups, c)
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=t == s, implementation=implementation
    )
    if masked:
        y_BTHC = attend(q_BTHC, k_BSKC, v_BSKC, mask=mask.allowed(0, s)[:, None])
    elif not mask.window:
        y_BTHC = attend(q_BTHC, k_BSKC, v_BSKC)
    else:
        attend_window = functools.partial(attend, local_window_size=(mask.window - 1, 0))
        if mask.use_window is None:
            y_BTHC = attend_window(q_BTHC, k_BSKC, v_BSKC)
        else:
            y_BTHC = jax.lax.cond(mask.use_window, attend_window, attend, q_BTHC, k_BSKC, v_BSKC)
    return checkpoint_name(y_BTHC.reshape(q_BTKGC.shape), SAVED_NAME)


def mask_shape(rows: int, queries: int, keys: int, *, packed: bool) -> tuple[int, int, int] | None:
    """Of the array that tells the kernels who sees whom; None where they need none."""
    return (rows, queries, keys) if packed or queries != keys else None


def fault(
    *,
    dtype: str,
    head_width: int,
    mask: tuple[int, int, int] | None = None,
    dropout: bool = False,
    softcap: float = 0.0,
) -> str:
    """What of this cuDNN's attention has not, and what to set; empty where it has all."""
    if dtype not in ("bfloat16", "float16"):
        return (
            f"cuDNN's attention computes in bfloat16 and not in {dtype}: set "
            "model.dtype = 'bfloat16', or model.attention = 'auto'"
        )
    if dropout:
        return (
            "cuDNN's attention has no dropout on its weights here: "
            "use model.attention = 'xla' or model.dropout = 0"
        )
    if softcap:
        return (
            f"cuDNN's attention has no soft cap (model.attention_softcap = {softcap}): "
            "use model.attention = 'auto'"
        )
    if head_width % 8:
        return (
            f"cuDNN's attention takes heads whose width is a multiple of 8, not {head_width}: "
            "use model.attention = 'auto'"
        )
    if mask and (mask[1] % 2 or mask[2] % 2):
        return (
            "cuDNN's attention takes packed documents or a split context in rows of an even length "
            f"alone, not {mask[1]} queries and {mask[2]} keys: use model.attention = 'auto'"
        )
    size = 2 * math.prod(mask or (0,))
    if size > MASK_LIMIT:
        return (
            "cuDNN's attention is told of packed documents or a split context by a mask of 2 bytes "
            f"for each query and key, here {size / 2**30:.1f} GiB, more than "
            f"{MASK_LIMIT / 2**30:.0f} GiB: use model.attention = 'blockwise', or fewer rows a step"
        )
    return ""
