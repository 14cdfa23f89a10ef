"""TODO docstring."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.runtime.sharding import AXES


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`, with -1 filled in. Raises UserError when it fits neither the devices nor the model."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = int(np.prod([n for n in sizes.values() if n > 0]))
    shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    count = len(devices)
    for axis, n in sizes.items():
        if n == -1:
            if count % fixed:
                raise UserError(
                    f"mesh {shown}: {count} devices are not a multiple of {fixed}, so mesh.{axis} = -1 cannot take what is left; make the fixed axes divide {count}"
                )
            sizes[axis] = count // fixed
    if (total := int(np.prod(list(sizes.values())))) != count:
        raise UserError(
            f"mesh {shown} needs {total} devices and there are {count}; set one axis to -1, or on a CPU XLA_FLAGS=--xla_force_host_platform_device_count={total}"
        )
    if faults := mesh_faults(config, sizes):
        raise UserError("\n".join(faults[:6]))
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def mesh_faults(config: Config, sizes: dict[str, int]) -> list[str]:
    """What the mesh does not divide, named before anything is compiled."""
    m, rows = config.model, config.train.batch_size // config.train.grad_accum_steps
    data, fsdp, tensor = sizes["data"], sizes["fsdp"], sizes["tensor"]
    micro = f"train.batch_size / train.grad_accum_steps = {rows}"
    checks = (
        (rows, data * fsdp, micro, f"mesh.data x mesh.fsdp = {data * fsdp}"),
        (m.kv, tensor, f"model.kv_heads = {m.kv}", f"mesh.tensor = {tensor}"),
        (m.mlp_width, tensor, f"model.mlp_dim = {m.mlp_width}", f"mesh.tensor = {tensor}"),
        (m.width, fsdp, f"model.width = {m.width}", f"mesh.fsdp = {fsdp}"),
        (
            m.padded_vocab,
            tensor * fsdp,
            f"the padded vocabulary of {m.padded_vocab} (model.vocab_multiple = {m.vocab_multiple})",
            f"mesh.tensor x mesh.fsdp = {tensor * fsdp}",
        ),
    )
    return [
        f"{axes} does not divide {what}: change one of them"
        for value, by, what, axes in checks
        if value % by
    ]
