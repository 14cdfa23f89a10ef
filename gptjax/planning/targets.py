"""Machines by name: `v5e-16`, `h100-8x4`, `cpu`, `here` to devices, their number and their shape.

To add a kind of device, add a row to `runtime.devices.DEVICES`; a TPU slice of another size is a
row of `_SLICES`.
"""

from __future__ import annotations

import dataclasses
import re

import jax

from gptjax.config.errors import UserError, nearest
from gptjax.runtime import devices
from gptjax.runtime.devices import DEVICES, Device

# {chips: shape of the slice}. Cloud TPU documentation, pages v5e, v6e, v5p, v4.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}
_SLICES: dict[str, dict[int, str]] = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
_CHIPS_OF_HOST = 4  # of every Cloud TPU slice of several hosts


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for; they need not be present.

    topology: their shape as `jax.experimental.topologies` takes it: "v5e:4x4" for libtpu,
    "1x4x8" (4 nodes of 8) for XLA:GPU, "" where no compiler describes such devices.
    """

    name: str
    device: Device
    count: int  # devices in all; a chip is one device
    hosts: int
    topology: str

    @property
    def node(self) -> int:
        """Devices that share the fast links: those of a slice or of a node."""
        return self.device.node or self.count


def parse(name: str) -> Target:
    """The target that a name means: KIND-COUNT, KIND-COUNTxNODES, `cpu`, `cpu-COUNT` or `here`.

    The number after a TPU counts chips, also after v4 and v5p (where Cloud TPU counts cores).
    Raises UserError for anything else, with the choices.
    """
    if name == "here":
        return _here()
    match = re.fullmatch(r"(?P<kind>[a-z0-9-]+?)(?:-(?P<count>\d+))?(?:x(?P<nodes>\d+))?", name)
    rows = {row.name: row for row in (*DEVICES, devices.cpu())}
    row = rows.get(match["kind"]) if match else None
    if match is None or row is None:
        near = nearest(name.rpartition("-")[0] or name, list(rows))
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"--target={name}: no such devices; {hint}There are {choices()}")
    count, nodes = int(match["count"] or 1), int(match["nodes"] or 1)
    if not count * nodes:
        raise UserError(f"--target={name}: no devices; such as --target={row.name}-8")
    if row.platform == "tpu":
        return _slice(name, row, count, bool(match["nodes"]))
    if row.platform == "gpu":
        return _nodes(name, row, count, int(match["nodes"] or 0))
    if match["nodes"]:
        raise UserError(f"--target={name}: several devices of a CPU are cpu-{count * nodes}")
    return Target(name, row, count, 1, "")


def choices() -> str:
    """The names of targets, for messages."""
    kinds = ", ".join(row.name for row in DEVICES)
    return (
        f"{kinds} with the number of devices, such as v5e-16, v5p-64, h100-8, h100-8x4 (4 nodes "
        "of 8); cpu; and here (the devices of this machine)"
    )


def larger(target: Target) -> list[str]:
    """Targets of more devices of the same kind, the smallest first."""
    kind = target.device.name
    if target.device.platform == "tpu":
        return [f"{kind}-{chips}" for chips in _SLICES[kind] if chips > target.count]
    if target.device.platform == "gpu":
        node = target.device.node
        return [f"{kind}-{n}" for n in (1, 2, 4) if target.count < n < node] + [
            f"{kind}-{node}x{nodes}"
            for nodes in (1, 2, 4, 8, 16, 32, 64, 128)
            if node * nodes > target.count
        ]
    return []


def _slice(name: str, row: Device, chips: int, has_nodes: bool) -> Target:
    shapes = _SLICES[row.name]
    if has_nodes or chips not in shapes:
        sizes = ", ".join(str(size) for size in shapes)
        raise UserError(f"--target={name}: slices of {row.name} have {sizes} chips")
    # libtpu describes the two cores of a v4 chip as two devices, so no program is compiled for it.
    topology = "" if row.name == "v4" else f"{row.name}:{shapes[chips]}"
    return Target(name, row, chips, max(1, chips // _CHIPS_OF_HOST), topology)


def _nodes(name: str, row: Device, count: int, nodes: int) -> Target:
    if not nodes:  # a number of devices alone: complete nodes, or a part of one
        nodes, left = divmod(count, row.node)
        if count < row.node:
            nodes, left = 1, 0
        if left:
            raise UserError(
                f"--target={name}: nodes of {row.node} do not make {count} devices; such as "
                f"{row.name}-{row.node}x{nodes + 1}"
            )
        count //= nodes
    elif count > row.node:
        raise UserError(
            f"--target={name}: a node has at most {row.node} devices; such as "
            f"{row.name}-{row.node}x{nodes}"
        )
    return Target(name, row, count * nodes, nodes, f"1x{nodes}x{count}")


def _here() -> Target:
    present = jax.devices()
    row = devices.describe(present[0])
    if row is None:
        raise UserError(
            f"--target=here: {present[0].device_kind!r} is not in the table of devices "
            "(gptjax/runtime/devices.py); name one like it"
        )
    return Target("here", row, len(present), jax.process_count(), "")
