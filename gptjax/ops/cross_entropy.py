"""Token cross-entropy as (sum, weight), float32, over chunks of positions: the logits of a whole batch never exist at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.model import transformer
from gptjax.ops import products
from gptjax.ops.materialize import materialize

_CHUNK_ELEMENTS = (
    1 << 24
)  # logits that one device holds at once where the config does not say: 64 MiB


def chunk_length(config: ModelConfig, batch: int, length: int, wanted: int) -> int:
    """Positions per chunk: `wanted`, or the largest divisor of `length` that keeps `batch` rows of logits within the budget."""
    if wanted:
        return wanted
    fits = [
        n
        for n in range(1, length + 1)
        if length % n == 0 and batch * n * config.padded_vocab <= _CHUNK_ELEMENTS
    ]
    # even where all logits would fit, two chunks: the promise holds at every size
    return max([n for n in fits if n < length or length == 1], default=1)


def head_loss(logits_BTC: Array, targets_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
    """(loss sum, sum of right answers) of a head on tokens: cross-entropy of int32 targets, or half the squared error of float32 ones (C = 1)."""
    if jnp.issubdtype(targets_BT.dtype, jnp.floating):
        error = logits_BTC[..., 0] - targets_BT
        return (weights_BT * 0.5 * jnp.square(error)).sum(), jnp.zeros(())
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BTC), targets_BT[..., None], -1)[..., 0]
    return -(weights_BT * chosen).sum(), (weights_BT * (logits_BTC.argmax(-1) == targets_BT)).sum()


def token_cross_entropy(
    config: ModelConfig,
    params: Params,
    x_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
) -> Array:
    """Sum over positions of weight * -log p(target), float32 scalar. x_BTD as `model.apply` returns it."""
    return _cross_entropy(
        config, chunk, x_BTD, transformer.head(params).astype(x_BTD.dtype), targets_BT, weights_BT
    )


def token_logprobs(
    config: ModelConfig, params: Params, x_BTD: Array, targets_BT: Array, *, chunk: int
) -> Array:
    """log p(target) of each position, float32 [B, T]; chunk by chunk, and computed again in the backward pass."""
    table = transformer.head(params).astype(x_BTD.dtype)

    @jax.checkpoint
    def one(piece: tuple[Array, Array]) -> Array:
        x, targets = piece
        _, logits, log_total, hit = _chunk(config, table.T, x, targets, jnp.zeros(targets.shape))
        return (jnp.where(hit, logits, 0.0).sum(-1) - log_total[:, 0]).reshape(targets.shape)

    found = jax.lax.map(one, _chunks(chunk, x_BTD, targets_BT))
    return jnp.moveaxis(found, 0, 1).reshape(targets_BT.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    config: ModelConfig, chunk: int, x: Array, table: Array, targets: Array, weights: Array
) -> Array:
    def add(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _chunk(config, products.transposed_copy(table), *piece)[0], None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(chunk, x, targets, weights))[0]


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [T / chunk, B, chunk, ...]: rows stay where they are when they are split over devices."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0) for a in arrays)


def _chunk(
    config: ModelConfig, table_DV: Array, x: Array, targets: Array, weights: Array
) -> tuple[Array, Array, Array, Array]:
    """(loss sum, logits [N, V], their log of the sum of exponentials [N, 1], one-hot targets) of one chunk, N = B * chunk."""
    logits = materialize(
        jnp.matmul(x.reshape(-1, x.shape[-1]), table_DV, preferred_element_type=jnp.float32)
    )
    logits = transformer.softcap(config, logits)
    ids = jnp.arange(config.padded_vocab)
    if config.padded_vocab != config.vocab_size:
        logits = jnp.where(ids < config.vocab_size, logits, -1e30)
    peak = materialize(logits.max(-1, keepdims=True))
    log_total = materialize(jnp.log(jnp.exp(logits - peak).sum(-1, keepdims=True)) + peak)
    # a sum over a mask, not a gather: it stays local where the vocabulary is split over devices
    hit = ids == targets.reshape(-1, 1)
    chosen = jnp.where(hit, logits, 0.0).sum(-1)
    return (weights.reshape(-1) * (log_total[:, 0] - chosen)).sum(), logits, log_total, hit


def _forward(
    config: ModelConfig, chunk: int, x: Array, table: Array, targets: Array, weights: Array
):
    """Both gradients in the same pass, while a chunk's logits are at hand: they are linear in the cotangent of the sum."""

    def add(carry: tuple[Array, Array], piece: tuple[Array, ...]):
        total, d_table = carry
        loss, logits, log_total, hit = _chunk(config, products.transposed_copy(table), *piece)
        x_c, _, weights_c = piece
        d_logits = (jnp.exp(logits - log_total) - hit) * weights_c.reshape(-1, 1)
        if cap := config.logit_softcap:
            d_logits = d_logits * (1 - jnp.square(jnp.maximum(logits, -cap) / cap))
        d_logits = materialize(d_logits.astype(x.dtype))
        d_x = jnp.einsum("NV,VD->ND", d_logits, table).reshape(x_c.shape)
        d_table += jnp.matmul(
            products.transposed_copy(d_logits),
            x_c.reshape(-1, x.shape[-1]),
            preferred_element_type=jnp.float32,
        )
        return (total + loss, d_table), d_x

    (total, d_table), d_x = jax.lax.scan(
        add, (jnp.zeros(()), jnp.zeros(table.shape)), _chunks(chunk, x, targets, weights)
    )
    return total, (jnp.moveaxis(d_x, 0, 1).reshape(x.shape), d_table.astype(table.dtype))


def _backward(config: ModelConfig, chunk: int, saved: tuple[Array, Array], g: Array):
    d_x, d_table = saved
    return (g * d_x).astype(d_x.dtype), (g * d_table).astype(d_table.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
