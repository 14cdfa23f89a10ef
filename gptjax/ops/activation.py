"""What stands between the two products of an MLP, and the soft cap of logits.

An activation takes what the first product gives: [..., F], or gate and up [..., 2, F]. To add one,
write a function and a row in `REFERENCES`, which is where the setting `model.mlp` looks; a faster
form goes into the table of its platform, such as `CPU`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.ops.materialize import Barrier, materialize, unchanged


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The tanh form of GELU, as in GPT-2 (Hendrycks & Gimpel 2016); in float32 inside."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def gelu_exact(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """GELU by the error function (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x sigmoid(1.702 x), GELU's other approximation (Hendrycks & Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


def swiglu(gate_up: Float[Array, "*S 2 F"]) -> Float[Array, "*S F"]:
    """silu(gate) * up (Shazeer 2020)."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def geglu(gate_up: Float[Array, "*S 2 F"]) -> Float[Array, "*S F"]:
    """gelu(gate) * up, in the tanh form (Shazeer 2020; Gemma)."""
    return jax.nn.gelu(gate_up[..., 0, :], approximate=True) * gate_up[..., 1, :]


def softcap(logits: Float[Array, "*S"], cap: float) -> Float[Array, "*S"]:
    """cap * tanh(logits / cap) (Gemma 2); logits as they are where cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu_recomputed(x: Float[Array, "*S"], barrier: Barrier = unchanged) -> Float[Array, "*S"]:
    """`gelu`; its gradient recomputes tanh instead of saving intermediates."""
    return gelu(x)


def _gelu_forward(x: Array, barrier: Barrier) -> tuple[Array, Array]:
    return barrier(gelu(barrier(x))), x


def _gelu_backward(barrier: Barrier, saved: Array, g: Array) -> tuple[Array]:
    c, x, g = math.sqrt(2 / math.pi), saved.astype(jnp.float32), barrier(g).astype(jnp.float32)
    t = jnp.tanh(c * (x + 0.044715 * x * x * x))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return (barrier((g * slope).astype(saved.dtype)),)


gelu_recomputed.defvjp(_gelu_forward, _gelu_backward)

Activation = Callable[[Array], Array]

REFERENCES: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_exact": gelu_exact,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swiglu": swiglu,
    "geglu": geglu,
}

ACCELERATOR: dict[str, Activation] = {**REFERENCES, "gelu": gelu_recomputed}

CPU: dict[str, Activation] = {
    "gelu": lambda x: materialize(gelu_recomputed(x, materialize)),
    "gelu_exact": lambda x: materialize(gelu_exact(materialize(x))),
    "quick_gelu": lambda x: materialize(quick_gelu(materialize(x))),
    "relu": lambda x: materialize(jax.nn.relu(materialize(x))),
    "silu": lambda x: materialize(jax.nn.silu(materialize(x))),
    "swiglu": lambda gate_up: materialize(swiglu(materialize(gate_up))),
    "geglu": lambda gate_up: materialize(geglu(materialize(gate_up))),
}
