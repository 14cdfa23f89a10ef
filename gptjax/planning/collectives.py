"""Collectives of a compiled program: how often each runs, how many bytes it moves, over which axes.

In: the optimised HLO of a step (`compiled.as_text()`) and the mesh it was compiled for. Out: a
`Collective` for each instruction that lets devices talk, with the loops around it counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from gptjax.planning import program
from gptjax.planning.program import Executed, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction. name: in the HLO. kind: of `KINDS`, a fused reduce and slice included.

    size: bytes of the complete array in one execution: what a gather gives, what a reduction
    takes. count: executions in a step. axes: of the mesh, over which it goes. devices: that take
    part in one group. dtypes: of the arrays. exact: False where a loop around it ends by its data.
    """

    name: str
    kind: str
    size: float
    count: int
    axes: tuple[str, ...]
    devices: int
    dtypes: tuple[str, ...]
    loops: tuple[str, ...] = ()  # names of the loops around it, outermost first
    exact: bool = True
    source: str = ""  # the operation of the model's code, as XLA kept it
    shapes: tuple[str, ...] = ()  # of the operands, on one device

    @property
    def total(self) -> float:
        """Bytes of the complete arrays in a step."""
        return self.size * self.count

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step by the ring algorithms."""
        share = (self.devices - 1) / self.devices
        if self.kind == "all-reduce":
            share *= 2
        if self.kind in ("collective-permute", "collective-broadcast"):
            share = 1.0
        return self.total * share


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """All collectives of the program between more than one device, in the order of its text.

    On TPUs one that goes on beside other work stands in every fusion of that work, under one
    channel: it counts once.
    """
    every, channels = [], set()
    for executed in program.parse(hlo).executed():
        kind = _kind(executed.instruction)
        if kind is None:
            continue
        channel = executed.instruction.attribute("channel_id")
        if executed.fused and channel:
            if (channel, executed.loops) in channels:
                continue
            channels.add((channel, executed.loops))
        every.append(_collective(executed, kind, mesh))
    return [one for one in every if one.devices > 1]


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _collective(executed: Executed, kind: str, mesh: Mesh) -> Collective:
    instruction = executed.instruction
    if kind == "all-reduce" and executed.computation_name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # fused on TPUs: each device keeps its slice
    groups = _groups(instruction.attributes, kind)
    devices = len(groups[0]) if groups else mesh.size
    shapes = _operand_shapes(executed)
    size = sum(map(_size, shapes))
    if kind == "all-gather":
        size *= devices
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        name=instruction.name,
        kind=kind,
        size=size,
        count=executed.count,
        axes=_axes(groups, mesh),
        devices=devices,
        dtypes=tuple(sorted({match[1] for match in shapes})),
        loops=executed.loops,
        exact=executed.exact,
        source=source[1] if source else "",
        shapes=tuple(match[0] for match in shapes),
    )


def _operand_shapes(executed: Executed) -> list[re.Match]:
    """The arrays that one device puts in. A permutation's may be followed by where to write."""
    instruction = executed.instruction
    if shapes := list(_SHAPE.finditer(instruction.arguments)):
        return shapes  # printed beside the names
    operands = [executed.computation[name] for name in instruction.operands]
    if instruction.opcode.startswith("collective-permute"):
        operands = operands[:1]
    return [match for operand in operands for match in _SHAPE.finditer(operand.result)]


def _size(match: re.Match) -> float:
    count = math.prod(int(n) for n in match[2].split(",") if n)
    dtype = match[1]
    if dtype in _BYTES:
        return count * _BYTES[dtype]
    bits = re.search(r"\d+", dtype)  # the first: f8e4m3fn
    return count * (int(bits[0]) / 8 if bits else 4)


def _groups(attributes: str, kind: str) -> list[list[int]]:
    """Numbers of the partitions that talk to one another; none for one group of all."""
    if kind == "collective-permute":
        match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
        text = match[1] + "}" if match else ""
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", text)]
    _, _, text = attributes.partition("replica_groups=")
    if text.startswith("mesh["):
        return _groups_of_mesh(text)
    if match := re.match(r"(\[[\d,]+\]<=\S*\])(T\([\d,]+\))?", text):
        return _iota(match[0])
    if match := re.match(r"\{(\{.*?\})\}", text):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if text and not text.startswith("{}"):
        raise ValueError(f"replica_groups={text[:80]}: not understood")
    return []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(text: str) -> list[list[int]]:
    """Groups `[2,4]<=[4,2]T(1,0)`: numbers counted up over [4,2], transposed, reshaped to [2,4]."""
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"replica_groups={text[:80]}: not understood")
    shape, dims = _numbers(match[1]), _numbers(match[2])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if match[3]:
        numbers = numbers.transpose(_numbers(match[3]))
    return numbers.reshape(shape).tolist()


def _groups_of_mesh(text: str) -> list[list[int]]:
    """Groups `mesh['data'=2,'fsdp'=4] {'fsdp'}`; `'fsdp':(2)2` is a part of an axis, from 2 on."""
    match = re.match(r"mesh\[(.*?)\](?:, ?device_ids=\((.*?)\))? \{(.*?)\}", text)
    if match is None or "=" not in match[1]:
        raise ValueError(f"replica_groups={text[:80]}: not understood")
    axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
    numbers = np.arange(math.prod(axes.values()))
    if match[2]:
        ids = re.sub(r"\s", "", match[2])
        numbers = np.array(_iota(ids) if "<=" in ids else _numbers(ids.strip("[]"))).reshape(-1)
    wanted = {}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", match[3]):
        wanted[name] = (int(before), int(size)) if size else (1, axes[name])
    dims: list[int] = []
    inside: list[int] = []
    for name, size in axes.items():
        before, part = wanted.get(name, (size, 1))
        inside.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    order = [i for i in range(len(dims)) if i not in inside] + inside
    group = math.prod(dims[i] for i in inside)
    return numbers.reshape(dims).transpose(order).reshape(-1, group).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh along which members of one group differ."""
    if not groups:
        return tuple(name for name, size in mesh.shape.items() if size > 1)
    differ = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), tuple(mesh.shape.values())))
        differ |= {i for i, row in enumerate(places) if len(set(row.tolist())) > 1}
    return tuple(name for i, name in enumerate(mesh.axis_names) if i in differ)
