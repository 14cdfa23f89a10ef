"""Token cross-entropy as (sum, weight), float32, over chunks of positions: the logits of a whole batch never exist at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax import model
from gptjax.config import ModelConfig

Array = jax.Array
_CHUNK_ELEMENTS = 1 << 24  # logits that one device holds at once where the config does not say: 64 MiB


def chunk_length(config: ModelConfig, batch: int, length: int, wanted: int) -> int:
    """Positions per chunk: `wanted`, or the largest divisor of `length` that keeps `batch` rows of logits within the budget."""
    if wanted:
        return wanted
    fits = [n for n in range(1, length + 1) if length % n == 0 and batch * n * config.padded_vocab <= _CHUNK_ELEMENTS]
    # even where all logits would fit, two chunks: the promise holds at every size
    return max([n for n in fits if n < length or length == 1], default=1)


def token_cross_entropy(config: ModelConfig, params: model.Params, x_BTD: Array, targets_BT: Array, weights_BT: Array, *, chunk: int) -> Array:
    """Sum over positions of weight * -log p(target), float32 scalar. x_BTD as `model.apply` returns it."""
    table = model.head(params).astype(x_BTD.dtype)
    length = x_BTD.shape[1]
    chunks = tuple(jnp.moveaxis(a.reshape(a.shape[0], length // chunk, chunk, *a.shape[2:]), 1, 0) for a in (x_BTD, targets_BT, weights_BT))

    @jax.checkpoint
    def one(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, targets, weights = piece
        logits = model.softcap(config, jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32))
        if config.padded_vocab != config.vocab_size:
            logits = jnp.where(jnp.arange(config.padded_vocab) < config.vocab_size, logits, -1e30)
        peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        log_total = jnp.log(jnp.exp(logits - peak).sum(-1)) + peak[..., 0]
        # a sum over a one-hot mask, not a gather: it stays local where the vocabulary is split over devices
        chosen = jnp.where(jnp.arange(config.padded_vocab) == targets[..., None], logits, 0.0).sum(-1)
        return total + (weights * (log_total - chosen)).sum(), None

    return jax.lax.scan(one, jnp.zeros(()), chunks)[0]
