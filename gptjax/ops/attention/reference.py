"""TODO docstring."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops.attention.mask import MASKED, Mask


def reference(
    q_BTKGC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    mask: Mask,
    *,
    block: int = 0,
    keep: Array | None = None,
) -> Array:
    """The definition, differentiated by JAX. keep [B, K, G, T, S]: dropout's multiplier of the weights, in every backend."""
    scores_BKGTS = (
        jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
        * q_BTKGC.shape[-1] ** -0.5
    )
    allowed_BTS = mask.allowed(0, k_BSKC.shape[1])
    probs_BKGTS = jax.nn.softmax(
        jnp.where(allowed_BTS[:, None, None], scores_BKGTS, MASKED), axis=-1
    )
    probs_BKGTS = probs_BKGTS if keep is None else probs_BKGTS * keep
    return jnp.einsum("BKGTS,BSKC->BTKGC", probs_BKGTS.astype(v_BSKC.dtype), v_BSKC)
