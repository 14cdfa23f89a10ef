"""Scores of predictions against references, each with its bootstrap interval.

In: predictions and references of N examples. Out: a dict of `Metric`: its `value` is the corpus score, its `interval()` how far to trust it. Every
metric is sums over examples and a function of the sums, so that a corpus score and its bootstrap are one thing. Shares lie in [0, 1]; BLEU and
chrF in [0, 100], as their field reports them. To add a metric, return one more `Metric` from a function below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError

_CHUNK_ELEMENTS = 1 << 20  # counts of a bootstrap that exist at once: 8 MiB


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """A score of sums: `stats` float64 [N, K], one row an example; `score` maps their sums [..., K] to [...]."""

    stats: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.score(self.stats.sum(0)))

    def interval(
        self, *, seed: int = 0, samples: int = 1000, level: float = 0.95
    ) -> tuple[float, float]:
        """(low, high) of the percentile bootstrap over examples (Efron 1979); the same seed draws the same examples."""
        return _interval(self.score, [self.stats], seed, samples, level)

    def difference(
        self, other: Metric, *, seed: int = 0, samples: int = 1000, level: float = 0.95
    ) -> tuple[float, float, float]:
        """(self - other, low, high) by the paired bootstrap (Koehn 2004): row i of both must come from the same example i."""
        if len(self.stats) != len(other.stats):
            raise UserError(
                f"a paired difference needs the same examples: here are {len(self.stats)} and {len(other.stats)}"
            )
        score = lambda ours, theirs: self.score(ours) - other.score(theirs)
        return self.value - other.value, *_interval(
            score, [self.stats, other.stats], seed, samples, level
        )


def _interval(
    score: Callable[..., np.ndarray],
    tables: list[np.ndarray],
    seed: int,
    samples: int,
    level: float,
) -> tuple[float, float]:
    """Percentiles of `score` of the tables' sums [samples, K] over N examples drawn with replacement, the same ones for every table [N, K]."""
    if samples < 1 or not 0 < level < 1:
        raise UserError(
            f"samples = {samples} and level = {level}: the bootstrap needs at least 1 sample and a level between 0 and 1"
        )
    count = len(tables[0])
    generator, rows = np.random.default_rng(seed), max(1, _CHUNK_ELEMENTS // count)
    values = []
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        counts = (
            np.bincount(drawn.ravel(), minlength=size * count)
            .reshape(size, count)
            .astype(np.float64)
        )  # 4x faster than multinomial()
        values.append(score(*(counts @ table for table in tables)))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_metric(values: Sequence[float] | np.ndarray) -> Metric:
    """The mean of one number an example, [N]."""
    return Metric(
        np.stack(np.broadcast_arrays(*stack_columns(values=values), 1.0), 1),
        lambda s: ratio(s[..., 0], s[..., 1]),
    )


def corpus_metric(value: float) -> Metric:
    """A number about all texts at once, which is no sum over examples: one row, and so no interval."""
    return Metric(np.array([[value]], np.float64), lambda s: s[..., 0])


def ratio(a: Any, b: Any) -> np.ndarray:
    """a / b, and 0 where b is not positive."""
    return np.divide(
        a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=np.asarray(b) > 0
    )


def check_same_length(**columns: Any) -> None:
    sizes = {name: len(column) for name, column in columns.items()}
    if 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise UserError(f"examples: {sizes}; every side needs the same number, at least 1")


def stack_columns(
    low: float = -math.inf, high: float = math.inf, *, kinds: str = "iuf", **columns: Any
) -> list[np.ndarray]:
    """Each of `columns` as an array [N] of one of NumPy's `kinds` of numbers, all finite and within low and high."""
    check_same_length(**columns)
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise UserError(
                f"{name} has shape {array.shape} and type {array.dtype}: must be one {'number' if 'f' in kinds else 'integer'} an example"
            )
        wrong = np.flatnonzero(~np.isfinite(array) | (array < low) | (array > high))
        if wrong.size:
            raise UserError(
                f"{name}[{wrong[0]}] = {array[wrong[0]]}: must be finite and from {low} to {high}"
            )
    return [array.astype(np.float64 if "f" in kinds else np.int64) for array in arrays.values()]
