"""TODO docstring."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.core.types import Batch
from gptjax.data.loader import empty_row


class PackedExample(NamedTuple):
    """What is packed whole: arrays [n], the lengths of its segments (one, or several that belong together), and a number for each where known."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    parts: tuple[int, ...]
    reference: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of whole units, each part a segment with positions of its own."""

    examples: list[PackedExample]
    rows: list[list[int]]
    length: int

    @classmethod
    def of(cls, examples: list[PackedExample], length: int, *, pack: bool, seed: int = 0) -> Packed:
        """First-fit in an order drawn by the seed, once; without `pack` one example a row, in their own order."""
        if not pack:
            return cls(examples, [[i] for i in range(len(examples))], length)
        order = (
            np.random.Generator(np.random.Philox(key=(seed, 0))).permutation(len(examples)).tolist()
        )
        return cls(
            examples, first_fit([len(examples[i].tokens) for i in order], order, length), length
        )

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def full(self) -> int:
        return self.count

    def with_reference(self, values: np.ndarray) -> Packed:
        """The same rows, with `values` for the parts of all examples in order."""
        starts = np.cumsum([0, *(len(unit.parts) for unit in self.examples)])
        pieces = [tuple(values[a:b].tolist()) for a, b in itertools.pairwise(starts)]
        return dataclasses.replace(
            self,
            examples=[
                unit._replace(reference=piece)
                for unit, piece in zip(self.examples, pieces, strict=True)
            ],
        )

    def row(self, i: int, shift: int = 0) -> Batch:
        first = self.examples[self.rows[i][0]]
        row = dataclasses.replace(
            empty_row(self.length),
            targets=np.zeros(self.length, first.targets.dtype),
            segment_ids=np.zeros(self.length, np.int32),
            reference=np.zeros(self.length, np.float32) if first.reference else None,
        )
        at = number = 0
        for k in self.rows[i]:
            unit = self.examples[k]
            here = slice(at, at + len(unit.tokens))
            row.tokens[here] = unit.tokens
            row.targets[here] = unit.targets
            row.loss_weights[here] = unit.weights
            for part, size in enumerate(unit.parts):
                number += 1
                row.segment_ids[at : at + size] = number
                row.positions[at : at + size] = np.arange(size)
                if unit.reference:
                    row.reference[at] = unit.reference[part]
                at += size
        row.positions[at:] = np.arange(self.length - at)
        return row


def first_fit(sizes: Sequence[int], names: Sequence[int], room: int) -> list[list[int]]:
    """Names into bins of `room`, each into the first that has space. A tree of the largest free spaces finds it in log(bins) steps."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    free = np.full(2 * leaves, room, np.int64)
    bins: list[list[int]] = [[] for _ in range(leaves)]
    for size, name in zip(sizes, names, strict=True):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= size else 2 * node + 1
        bins[node - leaves].append(name)
        free[node] -= size
        while node := node // 2:
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [found for found in bins if found]
