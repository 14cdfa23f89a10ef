"""Packed examples: rows of several complete examples, each a segment with positions of its own.

In: `PackedExample`s of a task. Out: a split whose rows the loader makes batches of.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.core.types import Batch
from gptjax.data.loader import empty_row


class PackedExample(NamedTuple):
    """One example as arrays [n]; a row takes it complete or not at all."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, or float32 where a head gives a number
    weights: np.ndarray  # float32
    parts: tuple[int, ...]  # lengths of its segments; a preference has one for each answer
    reference: tuple[float, ...] = ()  # a number for each part, where known (see Batch.reference)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A split (see `loader.Split`): rows[r] lists the examples of row r."""

    examples: list[PackedExample]
    rows: list[list[int]]
    length: int

    @classmethod
    def of(cls, examples: list[PackedExample], length: int, *, pack: bool, seed: int = 0) -> Packed:
        """First fit, once, in an order drawn by the seed; without `pack` one example a row."""
        if not pack:
            return cls(examples, [[i] for i in range(len(examples))], length)
        random = np.random.Generator(np.random.Philox(key=(seed, 0)))
        order = random.permutation(len(examples)).tolist()
        sizes = [len(examples[i].tokens) for i in order]
        return cls(examples, first_fit(sizes, order, length), length)

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def rows_per_epoch(self) -> int:
        """All rows."""
        return self.count

    def with_reference(self, values: np.ndarray) -> Packed:
        """The same rows, with `values` for the parts of all examples in order."""
        starts = np.cumsum([0, *(len(example.parts) for example in self.examples)])
        examples = []
        for example, (a, b) in zip(self.examples, itertools.pairwise(starts), strict=True):
            examples.append(example._replace(reference=tuple(values[a:b].tolist())))
        return dataclasses.replace(self, examples=examples)

    def row(self, i: int, shift: int = 0) -> Batch:
        """Arrays [T]; what the examples leave empty is segment 0. Packed rows are not shifted."""
        first = self.examples[self.rows[i][0]]
        row = dataclasses.replace(
            empty_row(self.length),
            targets=np.zeros(self.length, first.targets.dtype),
            segment_ids=np.zeros(self.length, np.int32),
            reference=np.zeros(self.length, np.float32) if first.reference else None,
        )
        start = segment = 0
        for k in self.rows[i]:
            example = self.examples[k]
            here = slice(start, start + len(example.tokens))
            row.tokens[here] = example.tokens
            row.targets[here] = example.targets
            row.loss_weights[here] = example.weights
            for part, size in enumerate(example.parts):
                segment += 1
                row.segment_ids[start : start + size] = segment
                row.positions[start : start + size] = np.arange(size)
                if example.reference:
                    row.reference[start] = example.reference[part]
                start += size
        row.positions[start:] = np.arange(self.length - start)
        return row


def first_fit(sizes: Sequence[int], items: Sequence[int], capacity: int) -> list[list[int]]:
    """Items into bins of `capacity`, each into the first bin that has space for its size.

    `free` is a binary tree in an array: leaf i holds the free space of bin i, and every node the
    largest of its two children, so that a bin is found in log(bins) steps.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    free = np.full(2 * leaves, capacity, np.int64)
    bins: list[list[int]] = [[] for _ in range(leaves)]
    for size, item in zip(sizes, items, strict=True):
        node = 1
        while node < leaves:
            left, right = 2 * node, 2 * node + 1
            node = left if free[left] >= size else right
        bins[node - leaves].append(item)
        free[node] -= size
        while node := node // 2:
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [items for items in bins if items]
