"""Products of activations with kernels, and what is added to them.

The references are `x @ w` and `y + b`. What stands below them is for XLA:CPU (measured in
experiments/LOG.md): operands by rows for bfloat16, and a product with few rows at the speed of
reading the weights.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32, Num

from gptjax.core import processor
from gptjax.ops.materialize import kept, materialize


def matmul(x: Float[Array, "N D"], w: Float[Array, "D F"]) -> Float[Array, "N F"]:
    """x [N, D] @ w [D, F]."""
    return x @ w


def bias_add(y: Float[Array, "N F"], bias: Float[Array, " F"]) -> Float[Array, "N F"]:
    """y [N, F] + bias [F]."""
    return y + bias


def residual_add(x: Float[Array, "*S"], update: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The residual stream x after a branch wrote its update."""
    return x + update


def residual_add_materialized(x: Array, update: Array) -> Array:
    """The same, written to memory once for all that read it."""
    return materialize(x + update)


def low_rank(
    x: Float[Array, "N D"], a: Float[Array, "D r"], b: Float[Array, "r F"]
) -> Float[Array, "N F"]:
    """(x [N, D] @ a [D, r]) @ b [r, F]: never the product of a and b."""
    return (x @ a) @ b


def low_rank_materialized(x: Array, a: Array, b: Array) -> Array:
    """The same, its inner product written to memory."""
    return materialize(x @ a) @ b


def low_rank_rows(
    x: Float[Array, "B T D"], a: Float[Array, "B r D"], b: Float[Array, "B F r"]
) -> Float[Array, "B T F"]:
    """`low_rank` where each row of a batch has its own a and b, as rows."""
    return jnp.einsum("BTR,BFR->BTF", jnp.einsum("BTD,BRD->BTR", x, a), b)


def low_rank_rows_cpu(x: Array, a: Array, b: Array) -> Array:
    """The same for T at most `FEW`, each row's sums in the order that they have alone."""
    inner_BTR = small_batch_matmul(x, a).astype(x.dtype)
    return small_batch_matmul(inner_BTR, b).astype(x.dtype)


def split_qkv(
    qkv: Float[Array, "B T K G2 C"], groups: int
) -> tuple[Float[Array, "B T K G C"], Float[Array, "B T K C"], Float[Array, "B T K C"]]:
    """[B, T, K, G + 2, C] -> q [B, T, K, G, C], k and v [B, T, K, C]."""
    return qkv[..., :groups, :], qkv[..., groups, :], qkv[..., groups + 1, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_qkv_materialized(qkv: Array, groups: int) -> tuple[Array, Array, Array]:
    """The same, its input written to memory once for the three; its gradient is a concatenation,
    where slicing's own would be a sum of three padded arrays, computed element by element."""
    return split_qkv(jax.lax.optimization_barrier(qkv), groups)


def _split_backward(groups: int, saved: None, grads: tuple[Array, Array, Array]) -> tuple[Array]:
    dq, dk, dv = jax.lax.optimization_barrier(grads)
    together = jnp.concatenate([dq, dk[..., None, :], dv[..., None, :]], -2)
    return (jax.lax.optimization_barrier(together),)


split_qkv_materialized.defvjp(
    lambda qkv, groups: (split_qkv_materialized(qkv, groups), None), _split_backward
)


def transposed(a: Float[Array, "N D"]) -> Float[Array, "D N"]:
    """a.T, an operand of a product."""
    return a.T


def transposed_copy(a: Float[Array, "N D"]) -> Float[Array, "D N"]:
    """a.T, written out by rows where it is bfloat16 (see `by_rows_matmul`)."""
    if a.dtype != jnp.bfloat16:
        return a.T
    # Without the first barrier a slice of stacked weights becomes part of the transpose, which is
    # then a loop element by element; without the second, the transpose part of the product.
    a = jax.lax.optimization_barrier(a)
    return jax.lax.optimization_barrier(with_layout_constraint(a.T, Layout((0, 1))))


def by_rows_matmul(x: Float[Array, "N D"], w: Float[Array, "D F"]) -> Float[Array, "N F"]:
    """`matmul` for CPUs: its gradients multiply bfloat16 operands by rows.

    From jax 0.12, XLA:CPU multiplies bfloat16 by rows on the matrix units of processors that have
    some (AMX), and a transposed operand three to four times slower without them. Not for arrays
    that XLA's partitioner splits over devices: a layout would undo that.
    """
    return _matmul(x, w) if x.dtype == w.dtype == jnp.bfloat16 else x @ w


def by_rows_bias_add(y: Float[Array, "N F"], bias: Float[Array, " F"]) -> Float[Array, "N F"]:
    """`bias_add` for CPUs: the gradient of a bfloat16 bias is a product."""
    return _bias_add(y, bias) if y.dtype == bias.dtype == jnp.bfloat16 else y + bias


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
    dx = None if w is None else g @ transposed_copy(w)
    return dx, None if x is None else transposed_copy(x) @ g


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def _bias_add(y: Array, bias: Array) -> Array:
    return y + bias


# the sum over rows as a product: XLA:CPU reduces bfloat16 as slowly as it multiplies 100 columns
_bias_add.defvjp(
    lambda y, bias: (y + bias, None),
    lambda _, g: (g, (jnp.ones((1, len(g)), g.dtype) @ g)[0]),
)

FEW = 8  # rows: with more, the sums do not fit the registers, and packing the weights pays
_SHORT = 16  # values of a sum: LLVM turns loops over fewer into vectors across rows
_SUMS = 8  # at a time, from which on LLVM keeps one register for each
# With FEW rows of x what it takes to read x is the limit, so it is read for as many parts of the
# weights at once as there are registers for sums: AVX-512 has 32.
_PARTS_OF_FEW = 3 if "avx512f" in processor.instruction_sets() else 1


class Part(NamedTuple):
    """Where in an array [B, F, D] of matrices those lie that a product is with."""

    first: Array | int = 0  # the first matrix
    row: Array | int = 0  # the first row of each
    column: Array | int = 0  # and the first value of each row
    rows: int = 0  # of each; 0: all

    def read(self, array: Array, at: int, shape: tuple[int, ...]) -> Array:
        """An array of this shape from row `at` of the part on."""
        return jax.lax.dynamic_slice(array, (self.first, self.row + at, self.column), shape)


def small_batch_matmul(
    x: Num[Array, "B N D"],
    rows: Num[Array, "B_or_more F_or_more D_or_more"],
    part: Part | None = None,
) -> Float32[Array, "B N F"]:
    """x [B, N, D] times rows [B, F, D] in any dtypes, N at most `FEW` -> float32 [B, N, F].

    part: of a larger `rows`, the one that is meant. It is read where it lies.

    For XLA:CPU, inside an `executables.jit`: one pass over the rows as they lie in memory, at the
    speed of reading them, where a dot packs them anew in every call. The F rows are cut into parts
    that are read at the same time, and the products of every part with every row of x are summed
    by *one* reduction of several operands: XLA fuses the products into it and leaves its loop to
    LLVM, which makes vectors of it. Of eight sums and more at once it makes one vector each; of
    fewer, several, in another order. So there are never fewer, and what a row of x gets does not
    depend on how many others there are.

    For N = 3 rows of x and F = 7 rows there are three parts of three rows; they start at 0, 3 and
    4 (the last one overlaps, so that all have one size). The operands are, part by part:

        rows[0:3] * x[0], rows[0:3] * x[1], rows[0:3] * x[2],
        rows[3:6] * x[0], ..., rows[4:7] * x[2]

    The results for x[0] are sum 0 (rows 0 to 2), sum 3 (rows 3 to 5) and the end of sum 6 (row 6).
    """
    part = part or Part()
    n, f = x.shape[1], part.rows or rows.shape[1]
    if jax.__version_info__ < (0, 12):
        x = kept(x)  # this XLA would compute it inside the reduction
    parts = _PARTS_OF_FEW if n == FEW else -(-_SUMS // n)
    size = -(-f // parts)
    starts = [min(at, f - size) for at in range(0, f, size)]
    operands = []
    for at in starts:
        some = part.read(rows, at, (len(x), size, x.shape[2])).astype(jnp.float32)
        for i in range(n):
            operands.append(some * x[:, i, None].astype(jnp.float32))
    add = lambda a, b: tuple(map(jnp.add, a, b))
    zeros = (jnp.float32(0),) * len(operands)
    sums = jax.lax.optimization_barrier(jax.lax.reduce(tuple(operands), zeros, add, (2,)))
    new_rows_of_last = len(starts) * size - f  # where the last part leaves the one before it
    results = []
    for i in range(n):
        of_row = sums[i::n]
        results.append(jnp.concatenate([*of_row[:-1], of_row[-1][:, new_rows_of_last:]], 1))
    return jnp.stack(results, 1)


def row_sum(x: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Sums over the last axis, of a row in the same order however many rows there are.

    For XLA:CPU, which rewrites a reduction of one operand by its shape: `_SUMS` parts of a row
    are summed at a time.
    """
    size = max(-(-x.shape[-1] // _SUMS), _SHORT)
    if filler := size * _SUMS - x.shape[-1]:
        x = jnp.concatenate([x, jnp.zeros((*x.shape[:-1], filler), x.dtype)], -1)
    x = materialize(x)
    parts = tuple(x[..., i * size : (i + 1) * size] for i in range(_SUMS))
    zeros = (jnp.zeros((), x.dtype),) * _SUMS
    add = lambda a, b: tuple(map(jnp.add, a, b))
    sums = materialize(jax.lax.reduce(parts, zeros, add, (x.ndim - 1,)))
    return functools.reduce(jnp.add, sums)
