"""A value that is computed once and written to memory, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.core.types import Array

Barrier = Callable[[Array], Array]


@jax.custom_vjp
def materialize(x: Array) -> Array:
    """x, behind a barrier that no fusion crosses, in both directions.

    XLA:CPU fuses a value into each of its readers and computes it again in every one; this stops it
    (measured in experiments/LOG.md). Accelerators want those fusions: their rows of the table have
    `unchanged` in its place.
    """
    return jax.lax.optimization_barrier(x)


materialize.defvjp(
    lambda x: (materialize(x), None), lambda _, g: (jax.lax.optimization_barrier(g),)
)


def unchanged(x: Array) -> Array:
    """x: what the other platforms have in the place of `materialize`."""
    return x


def kept(x: Array) -> Array:
    """`materialize` that XLA before jax 0.12 keeps too: it forgets barriers before it fuses, but a
    concatenation it keeps."""
    if jax.__version_info__ >= (0, 12):
        return materialize(x)
    return materialize(jnp.concatenate([x, x], -1))[..., : x.shape[-1]]
