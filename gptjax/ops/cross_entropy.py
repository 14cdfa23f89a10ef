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

# Logits that one device holds at once by default: 64 MiB on a CPU. An accelerator reads and writes
# the table's gradient once a chunk, which is to take less time than its products: 256 MiB.
_CHUNK_ELEMENTS = {"cpu": 1 << 24, "": 1 << 26}
_BLOCK_ELEMENTS = 1 << 26
_TABLE_GRADIENT_BYTES = 1 << 30


def chunk_length(padded_vocab: int, batch: int, length: int, platform: str = "cpu") -> int:
    """Positions per chunk: the largest divisor of `length` that keeps `batch` rows of logits within
    the budget. Even where all logits would fit there are two chunks: the promise holds at every
    size."""
    budget = _CHUNK_ELEMENTS.get(platform, _CHUNK_ELEMENTS[""])
    fits = [
        n for n in range(1, length + 1) if length % n == 0 and batch * n * padded_vocab <= budget
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
    Of several devices, each has a part of the vocabulary (along `tensor`) and of its columns (along
    `fsdp`), and this is its share of the sum.
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
    table_VD = all_columns(table_VD, x_BTD.shape[-1])
    logits = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)
    logits = collectives.gather(logits, "tensor", 2)[..., :vocab_size]
    logp = jax.nn.log_softmax(cap_logits(logits, softcap))
    return jnp.take_along_axis(logp, targets_BT[..., None], -1)[..., 0]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What does not change from step to step. barrier, transposed: the platform's.

    cpu: XLA:CPU is the compiler, for which some steps are better written otherwise.
    """

    vocab_size: int
    softcap: float
    chunk: int
    barrier: Barrier
    transposed: Barrier
    cpu: bool = False


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
    cpu: bool = False,
) -> Float32[Array, ""]:
    """As `reference`, `chunk` positions at a time (a divisor of T)."""
    form = _Form(vocab_size, softcap, chunk, barrier, transposed, cpu)
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
    table_VD = all_columns(table_VD, x_BTD.shape[-1])

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
    if form.cpu and collectives.size("tensor") == 1:
        target_ids = targets.reshape(-1, 1)
        target_logits = jnp.take_along_axis(logits, target_ids, -1, mode="clip")[:, 0]
    else:  # a sum over a mask: the target's logit, or 0 where another device has it
        target_logits = jnp.where(is_target, logits, 0.0).sum(-1)
    own_log_total = collectives.share(log_total[:, 0], "tensor")
    loss = (weights.reshape(-1) * (own_log_total - target_logits)).sum()
    return _Chunk(loss, logits, log_total, is_target)


def _d_logits(
    form: _Form, logits: Array, log_total: Array, is_target: Array, weights_N1: Array
) -> Array:
    """float32 [N, V]: the loss's gradient of the logits before their cap."""
    d_logits = (jnp.exp(logits - log_total) - is_target) * weights_N1
    if cap := form.softcap:
        d_logits = d_logits * (1 - jnp.square(jnp.maximum(logits, -cap) / cap))
    return d_logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(form: _Form, x: Array, columns: Array, targets: Array, weights: Array) -> Array:
    table = all_columns(columns, x.shape[-1])

    def add(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _chunk(form, form.transposed(table), *piece).loss, None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(form.chunk, x, targets, weights))[0]


def _forward(form: _Form, x: Array, columns: Array, targets: Array, weights: Array):
    """The sum and both gradients: they are linear in the cotangent of the sum."""
    if collectives.size("fsdp") > 1 and goes_over_vocabulary(columns.shape[0], x.shape[-1]):
        return _forward_over_vocabulary(form, x, columns, targets, weights)
    table = all_columns(columns, x.shape[-1])

    def add(carry: tuple[Array, Array], piece: tuple[Array, ...]):
        total, d_table = carry
        x_c, _, weights_c = piece
        table_DV = form.transposed(table)
        chunk = _chunk(form, table_DV, *piece)
        weights_N1 = weights_c.reshape(-1, 1)
        d_logits = _d_logits(form, chunk.logits, chunk.log_total, chunk.is_target, weights_N1)
        d_logits = form.barrier(d_logits.astype(x.dtype))
        d_logits_VN = form.transposed(d_logits)
        if form.cpu and x.dtype == jnp.bfloat16:
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
    d_columns = _sum_columns(d_table.astype(table.dtype), columns)
    return total, (jnp.moveaxis(d_x, 0, 1).reshape(x.shape), d_columns)


def all_columns(table: Array, width: int) -> Array:
    """A device's part of the vocabulary [V, D] with the columns that others along `fsdp` hold."""
    return table if table.shape[1] == width else collectives.gather(table, "fsdp", 1)


def _sum_columns(gradient: Array, columns: Array) -> Array:
    """The transpose: this device's columns of the sum of all gradients."""
    if gradient.shape[1] == columns.shape[1]:
        return gradient
    return collectives.sum_parts(gradient, "fsdp", 1)


def goes_over_vocabulary(vocab: int, width: int) -> bool:
    """Whether the float32 gradient of a table gathered over `fsdp` is too large to hold."""
    return 4 * vocab * width > _TABLE_GRADIENT_BYTES


def _forward_over_vocabulary(form: _Form, x: Array, columns: Array, targets: Array, weights: Array):
    """As `_forward`, by blocks of the vocabulary instead of positions.

    The logits are computed twice, first for their sum of exponentials. In exchange the gradient of
    a block of the table is complete at once, is summed over the devices, and is gone.
    """
    x_ND, vocab = x.reshape(-1, x.shape[-1]), columns.shape[0]
    target_N1, weight_N1 = targets.reshape(-1, 1), weights.reshape(-1, 1).astype(jnp.float32)
    size = block_length(vocab, len(x_ND))
    table = all_columns(columns, x.shape[-1]).reshape(-1, size, x.shape[-1])
    starts = collectives.index("tensor") * vocab + jnp.arange(0, vocab, size)

    def logits_of(block_VD: Array, start: Array) -> tuple[Array, Array]:
        logits = jnp.einsum("ND,VD->NV", x_ND, block_VD, preferred_element_type=jnp.float32)
        logits, ids = cap_logits(logits, form.softcap), start + jnp.arange(size)
        return jnp.where(ids < form.vocab_size, logits, -1e30), ids == target_N1

    def add_exponentials(carry: tuple[Array, ...], block: tuple[Array, Array]):
        peak, total, target = carry
        logits, is_target = logits_of(*block)
        new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
        total = total * jnp.exp(peak - new_peak)
        total += jnp.exp(logits - new_peak).sum(-1, keepdims=True)
        target += jnp.where(is_target, logits, 0.0).sum(-1, keepdims=True)
        return (new_peak, total, target), None

    zeros = jnp.zeros((len(x_ND), 1))
    blocks = (table, starts)
    (peak, total, target), _ = jax.lax.scan(add_exponentials, (zeros - 1e30, zeros, zeros), blocks)
    whole_peak = collectives.peak(peak, "tensor")
    total = collectives.total(total * jnp.exp(peak - whole_peak), "tensor")
    log_total = jnp.log(total) + whole_peak
    loss = (weight_N1 * (collectives.share(log_total, "tensor") - target)).sum()

    def differentiate(d_x: Array, block: tuple[Array, Array]):
        logits, is_target = logits_of(*block)
        d_logits = _d_logits(form, logits, log_total, is_target, weight_N1).astype(x.dtype)
        d_x += jnp.einsum("NV,VD->ND", d_logits, block[0], preferred_element_type=jnp.float32)
        return d_x, _sum_columns(d_logits.T @ x_ND, columns)

    d_x, d_columns = jax.lax.scan(differentiate, jnp.zeros(x_ND.shape), blocks)
    return loss, (d_x.astype(x.dtype).reshape(x.shape), d_columns.reshape(columns.shape))


@functools.cache
def block_length(vocab: int, positions: int) -> int:
    """Rows of the table in a block: a divisor of the vocabulary, its logits within the budget."""
    fits = [n for n in range(1, vocab + 1) if vocab % n == 0 and n * positions <= _BLOCK_ELEMENTS]
    return max(fits, default=1)


def _backward(form: _Form, saved: tuple[Array, Array], g: Array):
    d_x, d_table = saved  # summed over devices already: g is the same on all of them
    return (g * d_x).astype(d_x.dtype), (g * d_table).astype(d_table.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
