"""TODO docstring."""

from __future__ import annotations

import functools

import jax

from gptjax.core.types import Array
from gptjax.ops.materialize import materialize


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(x: Array, scale: Array, bias: Array | None, eps: float, centre: bool) -> Array:
    """LayerNorm (`centre`) or RMSNorm over the last axis, float32 in and out."""
    return _normalise_forward(x, scale, bias, eps, centre)[0]


def _normalise_forward(x: Array, scale: Array, bias: Array | None, eps: float, centre: bool):
    x = x - x.mean(-1, keepdims=True) if centre else x
    inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    unit = materialize(x * inverse)  # saved: the backward pass needs nothing else of x
    y = unit * scale
    return (y if bias is None else y + bias), (unit, inverse, scale, bias)


def _normalise_backward(eps: float, centre: bool, saved: tuple, g: Array):
    unit, inverse, scale, bias = saved
    g = materialize(g)
    rows = tuple(range(g.ndim - 1))
    gs = g * scale
    dx = gs - unit * (gs * unit).mean(-1, keepdims=True)
    if centre:
        dx = dx - gs.mean(-1, keepdims=True)
    return materialize(dx * inverse), (g * unit).sum(rows), None if bias is None else g.sum(rows)


normalise.defvjp(_normalise_forward, _normalise_backward)
