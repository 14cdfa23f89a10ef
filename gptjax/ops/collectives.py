"""What devices exchange while each computes its own part of a step.

Steps of several devices run inside one `jax.shard_map` over all axes of the mesh
(`runtime.sharding.on_each_device`), so every array in them is a device's own part, and these
functions are the only traffic. Outside, and along an axis of one device, each is the identity.

Their gradients are their transposes: gathering and summing parts are each other's. What makes the
result right is one rule: **each device computes its share of the loss; the loss is the
sum over all devices; the gradient of a parameter is the sum over the devices that hold a copy.**
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gptjax.core.types import Array


def size(axis: str) -> int:
    """Devices along an axis of the mesh; 1 outside of a manual region."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def index(axis: str) -> Array | int:
    """This device's number along an axis."""
    return jax.lax.axis_index(axis) if size(axis) > 1 else 0


def total(x: Array, *axes: str) -> Array:
    """The sum of x over the devices along these axes, on each of them."""
    split = tuple(axis for axis in axes if size(axis) > 1)
    return jax.lax.psum(x, split) if split else x


def peak(x: Array, axis: str) -> Array:
    """The maximum of x over the devices along an axis; over several, a constant for gradients."""
    return jax.lax.pmax(jax.lax.stop_gradient(x), axis) if size(axis) > 1 else x


def anywhere(flag: Array, axis: str) -> Array:
    """bool: whether the flag is set on some device along an axis."""
    return jax.lax.pmax(flag.astype(jnp.int32), axis) > 0 if size(axis) > 1 else flag


def share(x: Array, *axes: str) -> Array:
    """The part of x, which all devices along these axes computed alike, that each answers for."""
    copies = 1
    for axis in axes:
        copies *= size(axis)
    return x / copies if copies > 1 else x


def gather(x: Array, axis: str, dim: int) -> Array:
    """The parts of all devices along an axis, one after the other on dimension `dim`."""
    if size(axis) == 1:
        return x
    if axis == "fsdp":
        return _gather_over_fsdp(x, dim)
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def sum_parts(x: Array, axis: str, dim: int) -> Array:
    """This device's part, on dimension `dim`, of the sum of x over the devices along an axis."""
    if (count := size(axis)) == 1:
        return x
    if axis != "fsdp":
        return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    # Weights are cut into a few columns each. Where these are less than the 128 lanes of a TPU and
    # the fastest dimension of its layout, libtpu makes an all-reduce, which sends twice as much: so
    # the devices' parts get a dimension of their own, the first.
    shape = x.shape
    parts = x.reshape(*shape[:dim], count, shape[dim] // count, *shape[dim + 1 :])
    return jax.lax.psum_scatter(jnp.moveaxis(parts, dim, 0), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_over_fsdp(x: Array, dim: int) -> Array:
    """Its gradient is `sum_parts`."""
    return jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)


_gather_over_fsdp.defvjp(
    lambda x, dim: (_gather_over_fsdp(x, dim), None),
    lambda dim, _, g: (sum_parts(g, "fsdp", dim),),
)


def exchange(x: Array, axis: str, *, split: int, join: int) -> Array:
    """Cuts x on dimension `split` into a part for each device, and joins on `join` what comes."""
    if size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=join, tiled=True)


def part(x: Array, axis: str, dim: int) -> Array:
    """This device's part, on dimension `dim`, of an x that all devices along an axis have."""
    if (count := size(axis)) == 1:
        return x
    length = x.shape[dim] // count
    return jax.lax.dynamic_slice_in_dim(x, index(axis) * length, length, dim)


def once(x: Array, axis: str) -> Array:
    """x on the first device along an axis, 0 on the others: so that a sum counts it once."""
    return x if size(axis) == 1 else jnp.where(index(axis) == 0, x, jnp.zeros_like(x))


# The residual stream, between the products that split heads or hidden units over `tensor`, is split
# along the sequence: what stands there (norms, residual sums, dropout) is then divided, not
# repeated, and the traffic is that of a plain sum over `tensor`. A sequence that the devices do not
# divide, such as the one token of a step of decoding, stays whole.


def splits_sequence(length: int) -> bool:
    """Whether the residual stream of so many positions is split over `tensor`."""
    return size("tensor") > 1 and length % size("tensor") == 0


def whole_sequence(x_BTD: Array, length: int) -> Array:
    """[B, length, D] of the residual stream, for products split over `tensor`."""
    return gather(x_BTD, "tensor", 1) if splits_sequence(length) else x_BTD


def to_residual(y_BTD: Array) -> Array:
    """The sum over `tensor` of each device's part of a product, as the residual stream is split."""
    if splits_sequence(y_BTD.shape[1]):
        return sum_parts(y_BTD, "tensor", 1)
    return total(y_BTD, "tensor")


def own_sequence(x: Array) -> Array:
    """Of an x [B, T, ...] that all devices along `tensor` have, the part of the residual stream."""
    return part(x, "tensor", 1) if splits_sequence(x.shape[1]) else x
