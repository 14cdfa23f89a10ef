"""Products in the forms that XLA:CPU is fast with (measured in experiments/LOG.md). Other backends get the plain ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array


def matmul(x: Array, w: Array) -> Array:
    """x [N, D] @ w [D, F]."""
    return _matmul(x, w) if _by_rows(x, w) else x @ w


def plus(y: Array, bias: Array) -> Array:
    """y [N, F] + bias [F]."""
    return _plus(y, bias) if _by_rows(y, bias) else y + bias


def turned(a: Array) -> Array:
    """a.T, to be an operand of a product: written out by rows where that is what the product is fast with."""
    if not _by_rows(a):
        return a.T
    barrier = jax.lax.optimization_barrier  # or the transpose becomes part of the product again
    return barrier(with_layout_constraint(barrier(a.T), Layout((0, 1))))


_LANES = 16  # numbers of a row multiplied side by side, in one or two vector registers
_TERMS = 25  # such pieces after each other in a sum: a row leaves few sums behind, and the program stays short to compile


def _terms(width: int) -> int:
    return max((n for n in range(1, _TERMS + 1) if width % (_LANES * n) == 0), default=0)


def fits_lanes(width: int, dtype: Any) -> bool:
    """Whether `by_lanes` is the fast form of one vector times rows of `width` numbers: XLA:CPU multiplies one row of small types number by number.
    jax 0.10's makes many small loops of the lanes, widths with few divisors leave too many sums, and accelerators need no such form."""
    return jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12) and jnp.dtype(dtype).itemsize < 4 and _terms(width) >= 4


def by_lanes(x: Array, rows: Array) -> Array:
    """x [N, D], rows [N, F, D] in any type, D in 16s -> float32 [N, F]: sums of 16 lanes that run down each row, a loop over the rows as they lie in memory."""
    terms = _terms(x.shape[-1])
    cut = lambda a: a.reshape(*a.shape[:-1], -1, terms, _LANES)
    pieces = [cut(rows)[..., i, :].astype(jnp.float32) * cut(x)[:, None, :, i].astype(jnp.float32) for i in range(terms)]
    sums = jax.lax.optimization_barrier(functools.reduce(jnp.add, pieces)).reshape(*rows.shape[:2], -1)
    return sums @ jnp.ones(sums.shape[-1])  # faster than sum(-1)


def _by_rows(*operands: Array) -> bool:
    """From jax 0.12, XLA:CPU multiplies bfloat16 by rows on the matrix units of processors that have some (AMX), and a transposed operand three to
    four times slower without them (measured in experiments/LOG.md). Not where arrays are split over devices: a layout would undo that."""
    return all(a.dtype == jnp.bfloat16 for a in operands) and jax.default_backend() == "cpu" and jax.device_count() == 1


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
    return None if w is None else g @ turned(w), None if x is None else turned(x) @ g


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def _plus(y: Array, bias: Array) -> Array:
    return y + bias


# the sum over rows as a product: XLA:CPU reduces bfloat16 as slowly as it multiplies a hundred columns
_plus.defvjp(lambda y, bias: (y + bias, None), lambda _, g: (g, (jnp.ones((1, len(g)), g.dtype) @ g)[0]))
