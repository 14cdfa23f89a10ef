"""Bytes that a device sends in a step of training, by mesh axis: the least that its mesh needs.

A collective counts what one device sends around a ring: (n - 1) / n of the array in an all-gather,
a reduce-scatter or an exchange over n devices, twice that in an all-reduce. There is one function
for each axis; `docs/how-to/plan.md` says the formulas in words.

The letters are those of `model.transformer`; `training.memory.Work` is the share of a device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from gptjax.planning.targets import Target
from gptjax.runtime.sharding import AXES
from gptjax.training.memory import RECOMPUTED, Shapes, Work


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What one device sends to the others along `axes` in a step."""

    axes: tuple[str, ...]
    what: str
    sent: float  # bytes


def ring(size: float, devices: int) -> float:
    """Bytes that one device sends where an array of `size` bytes is gathered or scattered."""
    return size * (devices - 1) / devices


def over_fsdp(work: Work) -> list[Transfer]:
    """Weights gathered for use, their gradients reduce-scattered; embeddings exchanged.

    In a micro-batch every layer is gathered for the forward and again for the backward pass, the
    output table once, and the gradients of both are scattered once. Tokens of all devices are
    looked up in each one's columns of the table, and exchanged: once forward, once back.
    """
    n, m = work.sizes["fsdp"], work.micro_batches
    layers = ring(work.model.layers * work.matrices * work.item, n)
    table = ring(work.table * work.item, n)
    return [
        Transfer(("fsdp",), "weights, gathered", m * 2 * layers),
        Transfer(("fsdp",), "gradients of weights", m * layers),
        Transfer(("fsdp",), "output table and its gradient", m * 2 * table),
        Transfer(("fsdp",), "embeddings", m * 2 * ring(work.stream, n)),
    ]


def over_tensor(work: Work) -> list[Transfer]:
    """The residual stream, gathered before the two products that enter a block's branches and
    reduce-scattered after the two that leave them; the same backward, and what the backward pass
    computes again. The embedding and the loss take one of each."""
    n, m = work.sizes["tensor"], work.micro_batches
    stream = ring(work.positions * work.model.width * work.item, n)
    blocks = work.model.layers * (4 + 4 + RECOMPUTED[work.remat].tensor)
    return [
        Transfer(("tensor",), "residual stream", m * blocks * stream),
        Transfer(("tensor",), "embedding and loss", m * 4 * stream),
    ]


def over_context(work: Work) -> list[Transfer]:
    """Keys and values of every layer gathered, their gradients reduce-scattered."""
    n, model = work.sizes["context"], work.model
    heads = model.kv / work.sizes["tensor"]
    keys = 2 * work.rows * work.length * heads * model.head_width * work.item
    times = model.layers * (2 + RECOMPUTED[work.remat].context)
    return [Transfer(("context",), "keys and values", work.micro_batches * times * ring(keys, n))]


def once_a_step(shapes: Shapes, sizes: Mapping[str, int]) -> list[Transfer]:
    """Gradients summed in float32 after the last micro-batch, along the axes that do not split
    them: matrices over data and context, vectors over all four."""
    values: dict[tuple[str, ...], int] = {}
    for leaf in shapes.params:
        axes = tuple(axis for axis in AXES if axis not in leaf.axes and sizes[axis] > 1)
        values[axes] = values.get(axes, 0) + leaf.local_size(sizes)
    return [
        Transfer(axes, "gradients, once a step", 2 * ring(4 * count, _count(axes, sizes)))
        for axes, count in values.items()
        if axes
    ]


def transfers(shapes: Shapes, work: Work) -> list[Transfer]:
    """All that one device sends in a step."""
    lists = (over_fsdp(work), over_tensor(work), over_context(work))
    in_micro_batches = [transfer for transfers in lists for transfer in transfers]
    all_transfers = [*in_micro_batches, *once_a_step(shapes, work.sizes)]
    return [transfer for transfer in all_transfers if transfer.sent]


def by_axes(transfers: list[Transfer]) -> dict[tuple[str, ...], float]:
    """{axes: bytes that a device sends over them in a step}."""
    return sum_by_axes((transfer.axes, transfer.sent) for transfer in transfers)


def sum_by_axes(pairs: Iterable[tuple[tuple[str, ...], float]]) -> dict[tuple[str, ...], float]:
    """{axes: sum of the bytes} of (axes, bytes), the most bytes first."""
    sums: dict[tuple[str, ...], float] = {}
    for axes, size in pairs:
        sums[axes] = sums.get(axes, 0.0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def seconds(transfers: list[Transfer], target: Target, sizes: Mapping[str, int]) -> float | None:
    """What these take on links at their full rate, one after the other; None where the rate of a
    link is not known."""
    total = 0.0
    for transfer in transfers:
        rate = bandwidth(target, sizes, transfer.axes)
        if rate is None:
            return None
        total += transfer.sent / rate
    return total


def bandwidth(target: Target, sizes: Mapping[str, int], axes: tuple[str, ...]) -> float | None:
    """Bytes/s that a device sends at most to the others along `axes`; None where unknown.

    Devices are numbered with the last axis fastest, so it is groups of the first axes that reach
    across nodes. There, each member of a group in a node sends a part over its own adapter.
    """
    device, stride, span, members = target.device, 1, 1, 1
    for axis in reversed(AXES):
        if axis in axes:
            span = stride * sizes[axis]
            members *= max(1, min(sizes[axis], target.node // stride))
        stride *= sizes[axis]
    if span <= target.node or device.link is None:
        return device.link
    return None if device.network is None else min(device.link, device.network * members)


def _count(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
