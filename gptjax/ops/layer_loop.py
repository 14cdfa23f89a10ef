"""A loop over stacked blocks that reads each layer's parameters where they lie, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.core.types import Array


def layer_params(blocks: Any, layer: Array) -> Any:
    """The parameters of one of the blocks that are stacked on axis 0.

    `rows` stay whole, with "layer" beside them: their products (`ops.quantized`) read one layer's
    part, of which XLA would make a copy here.
    """
    if not isinstance(blocks, dict):
        return jax.lax.dynamic_index_in_dim(blocks, layer, keepdims=False)
    own = {k: v if k == "rows" else layer_params(v, layer) for k, v in blocks.items()}
    return own | {"layer": layer} if "rows" in blocks else own


def loop(step: Callable[[Array, Any], Any], carry: Any, count: int) -> Any:
    """carry = step(i, carry) for i from 0 to count - 1, as `while_loop`."""
    going = lambda state: state[0] < count
    one_more = lambda state: (state[0] + 1, step(*state))
    return while_loop(going, one_more, (jnp.int32(0), carry))[1]


def while_loop(going: Callable[[Any], Array], step: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop`, each operation by a kernel of its own.

    XLA:CPU makes one kernel of a loop that it takes for small: minutes to compile, on one core, and
    with sums in another order. A loop with a product of matrices, such as that of this unit matrix,
    it leaves alone.
    """

    def still_going(state: Any) -> Array:
        unit, inner = state
        return going(inner) & (unit[0, 0] > 0)

    def left_alone(state: Any) -> Any:
        unit, inner = state
        return unit @ unit, step(inner)

    return jax.lax.while_loop(still_going, left_alone, (jnp.eye(8), carry))[1]
