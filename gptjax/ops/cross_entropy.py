"""Cross-entropy of tokens, as a sum over positions, float32.

`reference` is the definition. `chunked` never holds the logits of a whole batch: it goes over
chunks of positions and makes both gradients in the forward pass, while a chunk's logits are there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Num

from gptjax.ops import collectives, products
from gptjax.ops.activation import softcap as cap_logits
from gptjax.ops.materialize import Barrier, unchanged

_CHUNK_ELEMENTS = 1 << 24  # logits that one device holds at once by default: 64 MiB


def chunk_length(padded_vocab: int, batch: int, length: int) -> int:
    """Positions per chunk: the largest divisor of `length` that keeps `batch` rows of logits within
    the budget. Even where all logits would fit there are two chunks: the promise holds at every
    size."""
    fits = [
        n
        for n in range(1, length + 1)
        if length % n == 0 and batch * n * padded_vocab <= _CHUNK_ELEMENTS
    ]
    return max([n for n in fits if n < length or length == 1], default=1)


def reference(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunk: int = 0,
) -> Float32[Array, ""]:
    """Sum over positions of weight * -log softmax(x table^T)[target], float32 scalar.

    Rows of the table past `vocab_size` are padding and take no part. chunk: for `chunked` alone.
    Where devices along `tensor` have a part of the table each, this is a device's share of the sum.
    """
    logp = reference_logprobs(x_BTD, table_VD, targets_BT, vocab_size=vocab_size, softcap=softcap)
    return collectives.share(-(weights_BT * logp).sum(), "tensor")


def reference_logprobs(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunk: int = 0,
) -> Float32[Array, "B T"]:
    """log p of each target, float32 [B, T]."""
    logits = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)
    logits = collectives.gather(logits, "tensor", 2)[..., :vocab_size]
    logp = jax.nn.log_softmax(cap_logits(logits, softcap))
    return jnp.take_along_axis(logp, targets_BT[..., None], -1)[..., 0]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What does not change from step to step. barrier, transposed: the platform's.

    one_cpu: no array is split over devices, and XLA:CPU computes what is better written otherwise.
    """

    vocab_size: int
    softcap: float
    chunk: int
    barrier: Barrier
    transposed: Barrier
    one_cpu: bool = False


def chunked(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunk: int,
    barrier: Barrier = unchanged,
    transposed: Barrier = products.transposed,
    one_cpu: bool = False,
) -> Float32[Array, ""]:
    """As `reference`, `chunk` positions at a time (a divisor of T)."""
    form = _Form(vocab_size, softcap, chunk, barrier, transposed, one_cpu)
    return _cross_entropy(form, x_BTD, table_VD, targets_BT, weights_BT)


def chunked_logprobs(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunk: int,
    barrier: Barrier = unchanged,
) -> Float32[Array, "B T"]:
    """As `reference_logprobs`, by chunks which the backward pass computes again."""
    form = _Form(vocab_size, softcap, chunk, barrier, products.transposed)

    @jax.checkpoint
    def logprobs_of(piece: tuple[Array, Array]) -> Array:
        x, targets = piece
        result = _chunk(form, table_VD.T, x, targets, jnp.zeros(targets.shape))
        target_logits = jnp.where(result.is_target, result.logits, 0.0).sum(-1)
        target_logits = collectives.total(target_logits, "tensor")
        return (target_logits - result.log_total[:, 0]).reshape(targets.shape)

    logprobs = jax.lax.map(logprobs_of, _chunks(chunk, x_BTD, targets_BT))
    return jnp.moveaxis(logprobs, 0, 1).reshape(targets_BT.shape)


def label_loss(
    logits_BTC: Float32[Array, "B T C"],
    targets_BT: Num[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(loss sum, sum of correct predictions) of a head on tokens: cross-entropy of int32 targets,
    or half the squared error of float32 ones (C = 1)."""
    if jnp.issubdtype(targets_BT.dtype, jnp.floating):
        error = logits_BTC[..., 0] - targets_BT
        return (weights_BT * 0.5 * jnp.square(error)).sum(), jnp.zeros(())
    logp = jax.nn.log_softmax(logits_BTC)
    target_logp = jnp.take_along_axis(logp, targets_BT[..., None], -1)[..., 0]
    correct = logits_BTC.argmax(-1) == targets_BT
    return -(weights_BT * target_logp).sum(), (weights_BT * correct).sum()


def label_set_loss(
    logits_BTC: Float32[Array, "B T C"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(loss sum, sum of sets that are right in all labels) of a head whose labels are independent.

    Bit c of a target says whether it has label c. The loss of a target is the mean of the binary
    cross-entropies of its labels.
    """
    is_set = (targets_BT[..., None] >> jnp.arange(logits_BTC.shape[-1])) & 1 == 1
    losses = jax.nn.softplus(jnp.where(is_set, -logits_BTC, logits_BTC)).mean(-1)
    correct = ((logits_BTC > 0) == is_set).all(-1)
    return (weights_BT * losses).sum(), (weights_BT * correct).sum()


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [T / chunk, B, chunk, ...]: rows stay on the device that holds them."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0) for a in arrays)


class _Chunk(NamedTuple):
    """One chunk of N = B * chunk positions."""

    loss: Array  # scalar
    logits: Array  # [N, V]
    log_total: Array  # [N, 1]: log of the sum of exponentials
    is_target: Array  # [N, V]


def _chunk(form: _Form, table_DV: Array, x: Array, targets: Array, weights: Array) -> _Chunk:
    x_ND = x.reshape(-1, x.shape[-1])
    logits = form.barrier(jnp.matmul(x_ND, table_DV, preferred_element_type=jnp.float32))
    logits = cap_logits(logits, form.softcap)
    # The vocabulary may be split over `tensor`: these are the ids of this device's logits.
    own = table_DV.shape[1]
    ids = jnp.arange(own) + collectives.index("tensor") * own
    if own * collectives.size("tensor") != form.vocab_size:
        logits = jnp.where(ids < form.vocab_size, logits, -1e30)
    peak = form.barrier(collectives.peak(logits.max(-1, keepdims=True), "tensor"))
    total = collectives.total(jnp.exp(logits - peak).sum(-1, keepdims=True), "tensor")
    log_total = form.barrier(jnp.log(total) + peak)
    is_target = ids == targets.reshape(-1, 1)
    if form.one_cpu:
        target_ids = targets.reshape(-1, 1)
        target_logits = jnp.take_along_axis(logits, target_ids, -1, mode="clip")[:, 0]
    else:  # a sum over a mask: the target's logit, or 0 where another device has it
        target_logits = jnp.where(is_target, logits, 0.0).sum(-1)
    own_log_total = collectives.share(log_total[:, 0], "tensor")
    loss = (weights.reshape(-1) * (own_log_total - target_logits)).sum()
    return _Chunk(loss, logits, log_total, is_target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(form: _Form, x: Array, table: Array, targets: Array, weights: Array) -> Array:
    def add(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _chunk(form, form.transposed(table), *piece).loss, None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(form.chunk, x, targets, weights))[0]


def _forward(form: _Form, x: Array, table: Array, targets: Array, weights: Array):
    """The sum and both gradients: they are linear in the cotangent of the sum."""

    def add(carry: tuple[Array, Array], piece: tuple[Array, ...]):
        total, d_table = carry
        x_c, _, weights_c = piece
        table_DV = form.transposed(table)
        chunk = _chunk(form, table_DV, *piece)
        d_logits = jnp.exp(chunk.logits - chunk.log_total) - chunk.is_target
        d_logits = d_logits * weights_c.reshape(-1, 1)
        if cap := form.softcap:
            d_logits = d_logits * (1 - jnp.square(jnp.maximum(chunk.logits, -cap) / cap))
        d_logits = form.barrier(d_logits.astype(x.dtype))
        d_logits_VN = form.transposed(d_logits)
        if form.one_cpu and x.dtype == jnp.bfloat16:
            # a product packs its second operand anew, and the table is the larger one by far
            d_x = form.barrier(jnp.matmul(table_DV, d_logits_VN)).T
        else:
            d_x = jnp.einsum("NV,VD->ND", d_logits, table)
        x_ND = x_c.reshape(-1, x.shape[-1])
        d_table += jnp.matmul(d_logits_VN, x_ND, preferred_element_type=jnp.float32)
        return (total + chunk.loss, d_table), d_x.reshape(x_c.shape)

    start = (jnp.zeros(()), jnp.zeros(table.shape))
    chunks = _chunks(form.chunk, x, targets, weights)
    (total, d_table), d_x = jax.lax.scan(add, start, chunks)
    return total, (jnp.moveaxis(d_x, 0, 1).reshape(x.shape), d_table.astype(table.dtype))


def _backward(form: _Form, saved: tuple[Array, Array], g: Array):
    d_x, d_table = saved
    return (g * d_x).astype(d_x.dtype), (g * d_table).astype(d_table.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
