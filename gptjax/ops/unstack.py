"""The parameters of stacked blocks, layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def unstack(blocks: Any) -> tuple[Any, ...]:
    """Blocks stacked on axis 0 as a tuple.

    Its gradient is one concatenation, where slicing's own would be a sum of L padded arrays.
    """
    leaves, structure = jax.tree.flatten(blocks)
    sizes = (1,) * leaves[0].shape[0]
    layers = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
    return tuple(jax.tree.unflatten(structure, [p[0] for p in layer]) for layer in layers)


@jax.custom_vjp
def unstack_together(blocks: Any) -> tuple[Any, ...]:
    """`unstack`, but if any leaf has a gradient, all leaves have one; not for forward derivatives.

    With rematerialisation a layer's products are then differentiated by one rule, whichever of its
    parameters are frozen. Without it, `products.by_rows_matmul` of a layer without a gradient is
    computed again instead of saved, and fails inside JAX where only later layers have one.
    """
    return unstack(blocks)


unstack_together.defvjp(
    lambda blocks: (unstack(blocks), None),
    lambda _, grads: (jax.tree.map(lambda *layers: jnp.stack(layers), *grads),),
)
