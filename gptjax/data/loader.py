"""Batches of a split: batch = f(seed, step, rows), with random access, read ahead by grain.

In: a split, which is a number of rows (windows of token shards here, packed examples in
`packing.py`). Out: `Batch`es of NumPy arrays. An epoch of training takes each row once, in a new
order. The global batch of a step does not depend on how many processes read it: each asks for its
own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Batch
from gptjax.data.shards import Prepared


class Split(Protocol):
    """What batches are made of."""

    @property
    def length(self) -> int:
        """Positions T in a row."""

    @property
    def count(self) -> int:
        """Number of rows that an evaluation takes."""

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that an epoch of training takes. Raises UserError where it is 0."""

    def row(self, i: int, shift: int = 0) -> Batch:
        """Row `i` as arrays [T]; `shift` in [0, T) moves it where the split allows that."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens over the concatenated shards of a split.

    A window begins at a multiple of the length, plus a random shift in training.
    """

    tokens: list[np.ndarray]  # one array a shard
    begins: np.ndarray  # where each shard begins in the split, and the end of the last
    documents: np.ndarray  # where each document begins in the split
    length: int
    mask_documents: bool  # documents become segments with positions of their own

    @classmethod
    def of(cls, prepared: Prepared, split: str, length: int, *, mask_documents: bool) -> Windows:
        """The windows of one split of prepared data."""
        tokens, documents = [], [np.zeros(0, np.int64)]
        begins = [0]
        for shard_tokens, offsets in prepared.arrays(split):
            tokens.append(shard_tokens)
            documents.append(offsets[:-1] + begins[-1])
            begins.append(begins[-1] + len(shard_tokens))
        return cls(tokens, np.array(begins), np.concatenate(documents), length, mask_documents)

    @property
    def total(self) -> int:
        """Tokens in the split."""
        return int(self.begins[-1])

    @property
    def count(self) -> int:
        """Windows that together hold every target once; the last may be partly empty."""
        return max(0, -(-(self.total - 1) // self.length))

    @property
    def rows_per_epoch(self) -> int:
        """Full windows; the tokens after the last come into windows by their shift."""
        if self.total < self.length + 1:
            raise UserError(
                f"the training split has {self.total} tokens and a row of {self.length} needs "
                f"{self.length + 1}: shorten data.length or model.context, or add text"
            )
        return (self.total - 1) // self.length

    def start(self, i: int, shift: int) -> int:
        """Where row i begins in the split. A shifted row ends with the split at the latest."""
        start = i * self.length
        return min(start + shift, self.total - 1 - self.length) if shift else start

    def row(self, i: int, shift: int = 0) -> Batch:
        """Row i; an unshifted last one is padded."""
        return self.window(self.start(i, shift))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32, across the borders of shards."""
        parts = []
        first = int(np.searchsorted(self.begins, start, side="right")) - 1
        for k in range(first, len(self.tokens)):
            begin = self.begins[k]
            if begin >= stop:
                break
            parts.append(self.tokens[k][max(start - begin, 0) : stop - begin])
        return np.concatenate(parts).astype(np.int32)

    def window(self, start: int) -> Batch:
        """Arrays [T] from token `start`; past the end of the split, positions of loss weight 0."""
        t = self.length
        ids = self.read(start, min(start + t + 1, self.total))
        real = len(ids) - 1
        ids = np.pad(ids, (0, t + 1 - len(ids)))
        arange = np.arange(t, dtype=np.int32)
        segments, positions = np.ones(t, np.int32), arange
        if self.mask_documents:
            first, last = np.searchsorted(self.documents, (start, start + t))
            cuts = (self.documents[first:last] - start).astype(np.int32)
            segments = 1 + np.searchsorted(cuts, arange, side="right").astype(np.int32)
            segment_starts = np.concatenate([[0], cuts]).astype(np.int32)
            positions = arange - segment_starts[segments - 1]
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
        self._split, self._seed, self._batch_size, self._rows = split, seed, batch_size, rows
        order = grain.MapDataset.range(split.rows_per_epoch)
        self._order = order.shuffle(seed=seed % (1 << 32)).repeat()

    def __len__(self) -> int:
        return 1 << 40

    def draw(self, example: int) -> tuple[int, int]:
        """(row of the split, shift) of an example, counted from the start of training."""
        random = np.random.Generator(np.random.Philox(key=(self._seed, example)))
        return int(self._order[example]), int(random.integers(self._split.length))

    def __getitem__(self, step: int) -> Batch:
        numbers = [step * self._batch_size + row for row in self._rows]
        return stack([self._split.row(*self.draw(number)) for number in numbers])


def window_starts(split: Windows, *, seed: int, examples: Iterable[int]) -> np.ndarray:
    """Where the windows of these training examples begin in the split, int64.

    examples: step x batch_size + row for a row of a step's global batch, see `train_batches`.
    """
    steps = _Steps(split, seed, 1, [0])
    starts = [split.start(*steps.draw(example)) for example in examples]
    return np.array(starts, np.int64)


def train_batches(
    split: Split, *, seed: int, batch_size: int, rows: Sequence[int], start: int
) -> grain.DatasetIterator[Batch]:
    """Endless batches from step `start` (0 is the first), read ahead by one thread.

    rows: those of the global batch that this process holds. Close the iterator when done. Raises
    UserError where the split is shorter than a row.
    """
    steps = grain.MapDataset.source(_Steps(split, seed, batch_size, rows))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(steps[start:].to_iter_dataset(options))


def eval_batches(
    split: Split, *, batch_size: int, rows: Sequence[int], limit: int = 0
) -> Iterator[Batch]:
    """Every row of the split once, in order; the last batch is filled up with rows of weight 0.

    rows: those of each batch that this process holds, beginning with row 0. limit: number of
    batches; 0 = all.
    """
    batches = -(-split.count // batch_size)
    if limit:
        batches = min(batches, limit)
    for b in range(batches):
        numbers = [b * batch_size + row for row in rows]
        real = [split.row(i) for i in numbers if i < split.count]
        padding = [padding_row(real[0])] * (len(numbers) - len(real))
        yield stack([*real, *padding])


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
