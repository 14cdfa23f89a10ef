"""TODO docstring."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops.materialize import materialize


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The tanh form of GELU, as in GPT-2 (Hendrycks & Gimpel 2016), in float32 inside: each bfloat16 operation would round, and cost two conversions. Its
    gradient recomputes tanh instead of saving intermediates."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_backward(saved: Array, g: Array):
    c, x, g = math.sqrt(2 / math.pi), saved.astype(jnp.float32), materialize(g).astype(jnp.float32)
    t = jnp.tanh(c * (x + 0.044715 * x * x * x))
    return (
        materialize(
            (g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))).astype(
                saved.dtype
            )
        ),
    )


gelu.defvjp(lambda x: (materialize(gelu(materialize(x))), x), _gelu_backward)
