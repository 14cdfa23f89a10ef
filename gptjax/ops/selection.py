"""Where to cut rows of numbers, found by halving: XLA:CPU sorts a row several times as long."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from gptjax.ops.layer_loop import while_loop


def sortable(x: Float32[Array, "*S"]) -> Int32[Array, "*S"]:
    """Integers in the order of the numbers, equal for equal ones; nan is above all."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    lowest, highest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    keys = jnp.where(bits == lowest, 0, jnp.where(bits < 0, bits ^ highest, bits))  # -0.0 == 0.0
    return jnp.where(jnp.isnan(x), highest, keys)


def least(
    holds: Callable[[Int32[Array, "B 1"]], Bool[Array, "B 1"]],
    low: Int32[Array, "B 1"],
    high: Int32[Array, "B 1"],
) -> Int32[Array, "B 1"]:
    """Of each row the least integer from low to high for which `holds`, which then holds for all
    larger ones; high if there is none."""

    def apart(ends: tuple[Array, Array]) -> Array:
        return (ends[0] < ends[1]).any()

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # low + high may be too large
        does = holds(middle) | (low == high)
        return jnp.where(does, low, middle + 1), jnp.where(does, middle, high)

    # elsewhere a number of rounds that is known: a GPU would ask the host for every other one
    return jax.lax.platform_dependent(
        (low, high),
        cpu=lambda ends: while_loop(apart, halve, ends)[1],
        default=lambda ends: jax.lax.fori_loop(0, 32, lambda _, ends: halve(ends), ends)[1],
    )
