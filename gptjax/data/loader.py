"""Rows of batches: windows of token shards, or packed examples; batch = f(seed, step, rows), random access, through grain.

A split is a number of rows, each taken once per epoch in a new order (windows start at a multiple of their length plus a random shift). The
global batch of a step does not depend on how many processes read it: each asks for its own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Batch
from gptjax.data.shards import Prepared


class Split(Protocol):
    """What batches are made of: `count` rows of `length` positions, of which an epoch of training takes the `full` ones; `shift` in [0, length) moves a row where the split allows it."""

    @property
    def length(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def full(self) -> int: ...

    def row(self, i: int, shift: int = 0) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows over the concatenated shards of a split. `isolate`: documents become segments with positions of their own."""

    tokens: list[np.ndarray]
    begins: np.ndarray  # where each shard begins in the split
    documents: np.ndarray  # where each document begins in the split
    length: int
    isolate: bool

    @classmethod
    def of(cls, prepared: Prepared, split: str, length: int, *, isolate: bool) -> Windows:
        pairs = list(prepared.arrays(split))
        begins = np.cumsum([0, *(len(tokens) for tokens, _ in pairs)])
        documents = np.concatenate(
            [
                np.zeros(0, np.int64),
                *(offsets[:-1] + begin for (_, offsets), begin in zip(pairs, begins, strict=False)),
            ]
        )
        return cls([tokens for tokens, _ in pairs], begins, documents, length, isolate)

    @property
    def total(self) -> int:
        return int(self.begins[-1])

    @property
    def count(self) -> int:
        return max(0, -(-(self.total - 1) // self.length))

    @property
    def full(self) -> int:
        """The rest at the end comes into windows by their shift."""
        if self.total < self.length + 1:
            raise UserError(
                f"the training split has {self.total} tokens and a row of {self.length} needs {self.length + 1}: shorten data.length or model.context, or add text"
            )
        return (self.total - 1) // self.length

    def row(self, i: int, shift: int = 0) -> Batch:
        """A shifted window ends with the split at the latest; an unshifted last one is filled up."""
        start = i * self.length
        return self.window(min(start + shift, self.total - 1 - self.length) if shift else start)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32, across shard borders."""
        parts = []
        for k in range(
            int(np.searchsorted(self.begins, start, side="right")) - 1, len(self.tokens)
        ):
            if self.begins[k] >= stop:
                break
            parts.append(self.tokens[k][max(start - self.begins[k], 0) : stop - self.begins[k]])
        return np.concatenate(parts).astype(np.int32)

    def window(self, start: int) -> Batch:
        """Arrays [T] of one example; past the end of the split, positions with loss weight 0."""
        t = self.length
        ids = self.read(start, min(start + t + 1, self.total))
        real = len(ids) - 1
        ids = np.pad(ids, (0, t + 1 - len(ids)))
        arange = np.arange(t, dtype=np.int32)
        segments, positions = np.ones(t, np.int32), arange
        if self.isolate:
            first, last = np.searchsorted(self.documents, (start, start + t))
            cuts = (self.documents[first:last] - start).astype(np.int32)
            segments = 1 + np.searchsorted(cuts, arange, side="right").astype(np.int32)
            positions = arange - np.concatenate([[0], cuts]).astype(np.int32)[segments - 1]
        return Batch(
            tokens=ids[:-1],
            targets=ids[1:],
            loss_weights=(arange < real).astype(np.float32),
            segment_ids=segments,
            positions=positions,
        )


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows with arrays [T] as one batch with arrays [B, T]."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


class _Steps:
    """Random access by step: the rows of that step's global batch that this process holds."""

    def __init__(self, split: Split, seed: int, batch_size: int, rows: Sequence[int]):
        self._split, self._batch_size, self._rows, self._seed = split, batch_size, rows, seed
        self._order = grain.MapDataset.range(split.full).shuffle(seed=seed % (1 << 32)).repeat()

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, step: int) -> Batch:
        result = []
        for row in self._rows:
            example = step * self._batch_size + row
            shift = np.random.Generator(np.random.Philox(key=(self._seed, example))).integers(
                self._split.length
            )
            result.append(self._split.row(int(self._order[example]), int(shift)))
        return stack(result)


def train_batches(
    split: Split, *, seed: int, batch_size: int, rows: Sequence[int], start: int
) -> grain.DatasetIterator[Batch]:
    """Endless batches from step `start` (0 is the first), read ahead by one thread. Close the iterator when done."""
    steps = grain.MapDataset.source(_Steps(split, seed, batch_size, rows))
    return iter(
        steps[start:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    )


def eval_batches(
    split: Split, *, batch_size: int, rows: Sequence[int], limit: int = 0
) -> Iterator[Batch]:
    """Every row of the split once, in order; the last batch is filled up with rows of weight 0."""
    batches = -(-split.count // batch_size)
    for b in range(min(batches, limit) if limit else batches):
        numbers = [b * batch_size + r for r in rows]
        found = [split.row(i) for i in numbers if i < split.count]
        padding = [padding_row(found[0])] * (len(numbers) - len(found))
        yield stack([*found, *padding])


def empty_row(length: int) -> Batch:
    """A row of weight 0, to be filled in place."""
    return Batch(
        tokens=np.zeros(length, np.int32),
        targets=np.zeros(length, np.int32),
        loss_weights=np.zeros(length, np.float32),
        segment_ids=np.ones(length, np.int32),
        positions=np.arange(length, dtype=np.int32),
    )


def padding_row(like: Batch) -> Batch:
    """A row of weight 0 with the fields and dtypes of another row."""
    zeros = jax.tree.map(np.zeros_like, like)
    empty = empty_row(len(like.tokens))
    return dataclasses.replace(zeros, segment_ids=empty.segment_ids, positions=empty.positions)
