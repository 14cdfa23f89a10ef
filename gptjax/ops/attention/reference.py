"""Attention as it is defined (Vaswani et al. 2017), with grouped heads (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gptjax.ops.activation import softcap as cap_softly
from gptjax.ops.attention.mask import MASKED, SAVED_NAME, Mask


def reference(
    q_BTKGC: Float[Array, "B T K G C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    mask: Mask,
    *,
    block: int = 0,
    dropout_BKGTS: Float[Array, "B K G T S"] | None = None,
    softcap: float = 0.0,
    hook: Callable[[str, Array], Array] | None = None,
) -> Float[Array, "B T K G C"]:
    """softmax(q k / sqrt(C)) v over the visible keys, [B, T, K, G, C]; the softmax in float32.

    dropout_BKGTS: what multiplies the weights (0, or 1 / (1 - rate)), in every backend. block: keys
    at a time, for the backends that work by blocks. softcap: scores become
    softcap * tanh(scores / softcap) (Gemma 2); 0 = off. hook: sees "scores" and "pattern" (the
    weights), [B, K, G, T, S], and may change them.
    """
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS * q_BTKGC.shape[-1] ** -0.5
    scores_BKGTS = cap_softly(scores_BKGTS, softcap)
    visible_BTS = mask.allowed(0, k_BSKC.shape[1])
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)
    if hook is not None:
        scores_BKGTS = hook("scores", scores_BKGTS)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if hook is not None:
        probs_BKGTS = hook("pattern", probs_BKGTS)
    if dropout_BKGTS is not None:
        probs_BKGTS = probs_BKGTS * dropout_BKGTS
    y_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", probs_BKGTS.astype(v_BSKC.dtype), v_BSKC)
    return checkpoint_name(y_BTKGC, SAVED_NAME)
