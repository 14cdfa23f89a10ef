"""The devices that generate and score together: data x tensor.

`tensor` splits the heads, the hidden units and the vocabulary of the model, and the cache with the
heads; `data` splits the texts of a batch. What a device holds is in `runtime.sharding`
(`decoding_specs`), what devices exchange in `ops.collectives`.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.runtime.sharding import AXES

_SPLITS = ("data", "tensor")


def decoding_mesh(config: ModelConfig, mesh: str | Mesh | None) -> Mesh | None:
    """The mesh of a model; None where it is one device, JAX's default one.

    mesh: such as "tensor=4,data=2", with -1 for all devices that are left; or the mesh of a run,
    whose devices along fsdp, tensor and context become as much `tensor` as the model's heads and
    hidden units allow, and the rest `data`. Raises UserError.
    """
    if isinstance(mesh, Mesh):
        return None if mesh.size == 1 else _of_run(config, mesh)
    if not mesh:
        return None
    if jax.process_count() > 1:
        raise UserError(f"mesh {mesh!r}: several processes cannot generate together: start one")
    sizes = _read(mesh)
    if faults := _faults(config, sizes["tensor"]):
        raise UserError("\n".join(faults))
    count = sizes["data"] * sizes["tensor"]
    return None if count == 1 else make(sizes, jax.devices()[:count])


def groups(mesh: Mesh | None) -> int:
    """Of devices, that the texts of a batch are divided between."""
    return mesh.shape["data"] if mesh else 1


def make(sizes: dict[str, int], devices: list[jax.Device]) -> Mesh:
    """A mesh of devices, which may be described. sizes: of `data` and `tensor`."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return _mesh(grid)


def _read(text: str) -> dict[str, int]:
    """{"data": devices, "tensor": devices}. Raises UserError where there are too few."""
    sizes = dict.fromkeys(_SPLITS, 1)
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name in AXES and name not in _SPLITS:
            raise UserError(
                f"mesh {text!r}: generation has no axis {name}: its devices split heads and "
                "vocabulary (tensor) or texts (data)"
            )
        if name not in _SPLITS:
            raise UserError(unknown_name("axis of the mesh", name, list(_SPLITS)))
        if not number.removeprefix("-").isdecimal() or int(number) < -1 or int(number) == 0:
            raise UserError(f"mesh {text!r}: {name} = {number!r} must be a number from 1, or -1")
        sizes[name] = int(number)
    count = jax.device_count()
    for name, other in (_SPLITS, _SPLITS[::-1]):
        if sizes[name] == -1:
            sizes[name] = max(count // max(sizes[other], 1), 1)
    if (needed := sizes["data"] * sizes["tensor"]) > count:
        raise UserError(
            f"mesh {text!r} needs {needed} devices and there are {count}; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes them"
        )
    return sizes


def _faults(config: ModelConfig, tensor: int) -> list[str]:
    """A message for each size of the model that so many devices do not divide."""
    sizes = {
        "key/value heads": config.kv,
        "hidden units": config.mlp_width,
    }
    return [
        f"mesh tensor={tensor} does not divide the model's {size:,} {name}: "
        f"set tensor to a divisor of {size:,}, and data for the other devices"
        for name, size in sizes.items()
        if size % tensor
    ]


def _of_run(config: ModelConfig, mesh: Mesh) -> Mesh:
    """The devices of a run's mesh in the same order, so that parameters can move between them."""
    inner = mesh.size // mesh.shape["data"]
    tensor = max(t for t in range(1, inner + 1) if not inner % t and not _faults(config, t))
    return _mesh(mesh.devices.reshape(-1, 1, tensor, 1))


def _mesh(grid: np.ndarray) -> Mesh:
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
