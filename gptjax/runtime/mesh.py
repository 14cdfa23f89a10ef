"""The mesh of devices that a run uses, and whether it fits the model."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.runtime.sharding import AXES


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`, with -1 filled in, over `devices` (default: all).

    Raises UserError if it fits neither the devices nor the model.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # an axis of the mesh may take a part of one of a TPU's torus, such as 32 of 64 chips
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: Config, count: int) -> dict[str, int]:
    """{axis: devices} of `config.mesh` on that many devices, with -1 filled in.

    Raises UserError if it fits neither them nor the model.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = math.prod(n for n in sizes.values() if n > 0)
    text = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    for axis, n in sizes.items():
        if n == -1:
            if count % fixed:
                raise UserError(
                    f"mesh {text}: {count} devices are not a multiple of {fixed}, so "
                    f"mesh.{axis} = -1 cannot take what is left; make the fixed axes divide {count}"
                )
            sizes[axis] = count // fixed
    if (total := math.prod(sizes.values())) != count:
        raise UserError(
            f"mesh {text} needs {total} devices and there are {count}; set one axis to -1, or on a "
            f"CPU XLA_FLAGS=--xla_force_host_platform_device_count={total}"
        )
    if faults := mesh_faults(config, sizes):
        raise UserError("\n".join(faults[:6]))
    return sizes


class _Division(NamedTuple):
    """A size of the model that must be a multiple of the devices it is split over."""

    size: int
    size_name: str
    devices: int
    devices_name: str


def mesh_faults(config: Config, sizes: dict[str, int]) -> list[str]:
    """A message for each size that the mesh does not divide. sizes: {axis: devices}."""
    m, t = config.model, config.train
    rows = t.batch_size // max(t.grad_accum_steps, 1)  # 0: chosen later, to fit the mesh
    data, fsdp, tensor, context = (sizes[axis] for axis in AXES)
    rows_name = f"train.batch_size / train.grad_accum_steps = {rows}"
    vocab_name = (
        f"the padded vocabulary of {m.padded_vocab} (model.vocab_multiple = {m.vocab_multiple})"
    )
    divisions = [
        _Division(rows, rows_name, data * fsdp, f"mesh.data x mesh.fsdp = {data * fsdp}"),
        _Division(m.kv, f"model.kv_heads = {m.kv}", tensor, f"mesh.tensor = {tensor}"),
        _Division(m.mlp_width, f"model.mlp_dim = {m.mlp_width}", tensor, f"mesh.tensor = {tensor}"),
        _Division(m.width, f"model.width = {m.width}", fsdp, f"mesh.fsdp = {fsdp}"),
        _Division(m.padded_vocab, vocab_name, tensor, f"mesh.tensor = {tensor}"),
        _Division(
            config.length,
            f"data.length or model.context = {config.length}",
            tensor * context,
            f"mesh.tensor x mesh.context = {tensor * context}",
        ),
    ]
    return [
        f"{d.devices_name} does not divide {d.size_name}: change one of them"
        for d in divisions
        if d.size % d.devices
    ]
