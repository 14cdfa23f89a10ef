"""Token shards to batches: batch = f(seed, step, rows), random access, through grain.

Each window starts at a multiple of the context plus a random shift, all of them once per epoch in a new order. The global
batch of a step does not depend on how many processes read it: each asks for its own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from gptjax.config import UserError
from gptjax.data.prepare import Prepared

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows over the concatenated shards of a split. `isolate`: documents become segments with positions of their own."""

    tokens: list[np.ndarray]
    begins: np.ndarray  # where each shard begins in the split
    documents: np.ndarray  # where each document begins in the split
    context: int
    isolate: bool

    @classmethod
    def of(cls, prepared: Prepared, split: str, context: int, *, isolate: bool) -> Windows:
        pairs = list(prepared.arrays(split))
        begins = np.cumsum([0, *(len(tokens) for tokens, _ in pairs)])
        documents = np.concatenate([np.zeros(0, np.int64), *(offsets[:-1] + begin for (_, offsets), begin in zip(pairs, begins, strict=False))])
        return cls([tokens for tokens, _ in pairs], begins, documents, context, isolate)

    @property
    def total(self) -> int:
        return int(self.begins[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32, across shard borders."""
        parts = []
        for k in range(int(np.searchsorted(self.begins, start, side="right")) - 1, len(self.tokens)):
            if self.begins[k] >= stop:
                break
            parts.append(self.tokens[k][max(start - self.begins[k], 0) : stop - self.begins[k]])
        return np.concatenate(parts).astype(np.int32)

    def window(self, start: int) -> Batch:
        """Arrays [T] of one example; past the end of the split, positions with loss weight 0."""
        t = self.context
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
        return {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "loss_weights": (arange < real).astype(np.float32),
            "segment_ids": segments,
            "positions": positions,
        }


def stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class _Steps:
    """Random access by step: the rows of that step's global batch that this process holds."""

    def __init__(self, windows: Windows, seed: int, batch_size: int, rows: Sequence[int]):
        self._windows, self._batch_size, self._rows, self._seed = windows, batch_size, rows, seed
        self._count = max(1, (windows.total - 1) // windows.context)
        self._order = grain.MapDataset.range(self._count).shuffle(seed=seed % (1 << 32)).repeat()

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, step: int) -> Batch:
        w = self._windows
        result = []
        for row in self._rows:
            example = step * self._batch_size + row
            shift = np.random.Generator(np.random.Philox(key=(self._seed, example))).integers(w.context)
            result.append(w.window(min(int(self._order[example]) * w.context + int(shift), w.total - 1 - w.context)))
        return stack(result)


def train_batches(windows: Windows, *, seed: int, batch_size: int, rows: Sequence[int], start: int) -> grain.DatasetIterator[Batch]:
    """Endless batches from step `start` (0 is the first), read ahead by one thread. Close the iterator when done."""
    if windows.total < windows.context + 1:
        raise UserError(
            f"the training split has {windows.total} tokens and model.context = {windows.context} needs {windows.context + 1}: shorten the context or add text"
        )
    steps = grain.MapDataset.source(_Steps(windows, seed, batch_size, rows))
    return iter(steps[start:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(windows: Windows, *, batch_size: int, rows: Sequence[int], limit: int = 0) -> Iterator[Batch]:
    """Every token of the split once, in order; the last batch is filled up with examples of weight 0."""
    count = max(0, -(-(windows.total - 1) // windows.context))
    batches = -(-count // batch_size)
    for b in range(min(batches, limit) if limit else batches):
        yield stack([windows.window(i * windows.context) if i < count else _nothing(windows.context) for i in (b * batch_size + r for r in rows)])


def _nothing(context: int) -> Batch:
    zeros = np.zeros(context, np.int32)
    return {
        "tokens": zeros,
        "targets": zeros,
        "loss_weights": zeros.astype(np.float32),
        "segment_ids": zeros + 1,
        "positions": np.arange(context, dtype=np.int32),
    }
