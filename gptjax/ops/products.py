"""Products in the forms that XLA:CPU is fast with (measured in experiments/LOG.md). Other backends get the plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint

from gptjax.core.types import Array


def matmul(x: Array, w: Array) -> Array:
    """x [N, D] @ w [D, F]."""
    return _matmul(x, w) if _by_rows(x, w) else x @ w


def bias_add(y: Array, bias: Array) -> Array:
    """y [N, F] + bias [F]."""
    return _plus(y, bias) if _by_rows(y, bias) else y + bias


def transposed_copy(a: Array) -> Array:
    """a.T, to be an operand of a product: written out by rows where that is what the product is fast with."""
    if not _by_rows(a):
        return a.T
    return jax.lax.optimization_barrier(
        with_layout_constraint(a.T, Layout((0, 1)))
    )  # or the transpose becomes part of the product again


FEW = 8  # rows of x: with more, the sums do not fit the registers, and packing the weights for a dot pays


def small_batch_matmul(x: Array, rows: Array) -> Array:
    """x [B, N, D] times rows [B, F, D] in any types, N at most `FEW` -> float32 [B, N, F], inside a `programs.jit`.

    One pass over the rows as they lie in memory, on a CPU at the speed of reading them, where a dot packs them anew in every call. For that the sums of
    up to four parts of the rows with each row of x are one reduction of several operands: XLA:CPU fuses the products into it, leaves its
    loop whole for LLVM to make vectors of, and reads several places of memory at a time."""
    (_, n, d), f = x.shape, rows.shape[1]
    if (
        jax.__version_info__ < (0, 12)
    ):  # forgets barriers before it fuses, and would compute x in the reduction, but not a concatenation
        x = jax.lax.optimization_barrier(jnp.concatenate([x, x], 2))[:, :, :d]
    size = -(-f // max(1, min(4, 10 // n)))
    starts = [min(at, f - size) for at in range(0, f, size)]
    terms = [
        rows[:, at : at + size].astype(jnp.float32) * x[:, i, None].astype(jnp.float32)
        for at in starts
        for i in range(n)
    ]
    add = lambda a, b: tuple(map(jnp.add, a, b))
    sums = jax.lax.optimization_barrier(
        jax.lax.reduce(tuple(terms), (jnp.float32(0),) * len(terms), add, (2,))
    )
    ends = [
        jnp.concatenate([*sums[i:-n:n], sums[i - n][:, len(starts) * size - f :]], 1)
        for i in range(n)
    ]
    return jnp.stack(ends, 1)


def _by_rows(*operands: Array) -> bool:
    """From jax 0.12, XLA:CPU multiplies bfloat16 by rows on the matrix units of processors that have some (AMX), and a transposed operand three to
    four times slower without them (measured in experiments/LOG.md). Not where arrays are split over devices: a layout would undo that."""
    return (
        all(a.dtype == jnp.bfloat16 for a in operands)
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
    )


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    return x @ w


def _forward(x: CustomVJPPrimal, w: CustomVJPPrimal):
    """Saves only what is asked for: nothing of x where w is frozen."""
    return x.value @ w.value, (x.value if w.perturbed else None, w.value if x.perturbed else None)


def _backward(saved: tuple[Array | None, Array | None], g: Array | SymbolicZero):
    x, w = saved
    if isinstance(g, SymbolicZero):
        return None, None
    return None if w is None else g @ transposed_copy(w), None if x is None else transposed_copy(
        x
    ) @ g


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def _plus(y: Array, bias: Array) -> Array:
    return y + bias


# the sum over rows as a product: XLA:CPU reduces bfloat16 as slowly as it multiplies a hundred columns
_plus.defvjp(
    lambda y, bias: (y + bias, None), lambda _, g: (g, (jnp.ones((1, len(g)), g.dtype) @ g)[0])
)
