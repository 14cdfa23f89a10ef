"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019) over the last axis, in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.ops.materialize import Barrier, materialize, unchanged
from gptjax.ops.products import row_sum


def reference(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    *,
    eps: float,
    center: bool,
) -> Float[Array, "... D"]:
    """x [..., D] with unit variance (and, with `center`, zero mean) times scale plus bias [D].

    Computed in float32, returned in the dtype of x.
    """
    y = x.astype(jnp.float32)
    if center:
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def saving_unit(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    *,
    eps: float,
    center: bool,
    barrier: Barrier = unchanged,
) -> Float[Array, "... D"]:
    """The same; its backward pass needs of x only the normalized values, which are saved."""
    return _normalize(x.astype(jnp.float32), scale, bias, eps, center, barrier).astype(x.dtype)


def saving_unit_cpu(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    *,
    eps: float,
    center: bool,
) -> Float[Array, "... D"]:
    """The same, written to memory once for all that read it."""
    y = saving_unit(x, scale, bias, eps=eps, center=center, barrier=materialize)
    return materialize(y)


def in_order(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    *,
    eps: float,
    center: bool,
) -> Float[Array, "... D"]:
    """The same for decoding on CPUs: a row's sums have one order, however many rows there are."""
    y, width = materialize(x.astype(jnp.float32)), x.shape[-1]
    if center:
        y = materialize(y - row_sum(y)[..., None] / width)
    variance = row_sum(y * y)[..., None] / width
    # for each value anew: vectors of roots are not rounded as single ones are
    variance = materialize(jnp.broadcast_to(variance, y.shape))
    root = materialize(jax.lax.rsqrt(variance + eps))
    y = materialize(y * root) * scale  # or three factors had any order
    return materialize((y if bias is None else y + bias).astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalize(
    x: Array, scale: Array, bias: Array | None, eps: float, center: bool, barrier: Barrier
) -> Array:
    return _forward(x, scale, bias, eps, center, barrier)[0]


def _forward(
    x: Array, scale: Array, bias: Array | None, eps: float, center: bool, barrier: Barrier
):
    x = x - x.mean(-1, keepdims=True) if center else x
    inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    unit = barrier(x * inverse)
    y = unit * scale
    return (y if bias is None else y + bias), (unit, inverse, scale, bias)


def _backward(eps: float, center: bool, barrier: Barrier, saved: tuple, g: Array):
    unit, inverse, scale, bias = saved
    g = barrier(g)
    rows = tuple(range(g.ndim - 1))
    d_unit = g * scale
    dx = d_unit - unit * (d_unit * unit).mean(-1, keepdims=True)
    if center:
        dx = dx - d_unit.mean(-1, keepdims=True)
    d_bias = None if bias is None else g.sum(rows)
    return barrier(dx * inverse), (g * unit).sum(rows), d_bias


_normalize.defvjp(_forward, _backward)
