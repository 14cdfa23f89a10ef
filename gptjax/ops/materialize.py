"""TODO docstring."""

from __future__ import annotations

import jax

from gptjax.core.types import Array


@jax.custom_vjp
def _barrier(x: Array) -> Array:
    return jax.lax.optimization_barrier(x)


_barrier.defvjp(lambda x: (_barrier(x), None), lambda _, g: (jax.lax.optimization_barrier(g),))


def materialize(x: Array) -> Array:
    """x, computed once, forward and backward. XLA:CPU would otherwise fuse x into each of its readers and compute it again in
    every one; measured in experiments/LOG.md. On accelerators fusion is what one wants, and this does nothing."""
    return _barrier(x) if jax.default_backend() == "cpu" else x
