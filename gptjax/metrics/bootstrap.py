"""Scores of predictions against references, each with its bootstrap interval.

In: predictions and references of N examples. Out: a dict of `Metric`, whose `value` is the corpus
score and whose `interval()` says how far to trust it. Every metric is a table of sums over
examples and a function of those sums, so a corpus score and its bootstrap are one thing. Shares
lie in [0, 1]; BLEU and chrF in [0, 100], as their field reports them.

To add a metric, write a function of the sums and add a row to the table of its file.
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
    """A score of sums.

    stats: float64 [N, K], a row for each example; score: a function of sums [..., K] to [...].
    """

    stats: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.score(self.stats.sum(0)))

    def interval(
        self, *, seed: int = 0, samples: int = 1000, level: float = 0.95
    ) -> tuple[float, float]:
        """(low, high) of the percentile bootstrap over examples (Efron 1979).

        The same seed draws the same examples. Raises UserError.
        """
        return _interval(self.score, [self.stats], seed=seed, samples=samples, level=level)

    def difference(
        self, other: Metric, *, seed: int = 0, samples: int = 1000, level: float = 0.95
    ) -> tuple[float, float, float]:
        """(self - other, low, high) by the paired bootstrap (Koehn 2004).

        Row i of both must come from the same example i. Raises UserError.
        """
        if len(self.stats) != len(other.stats):
            raise UserError(
                "a paired difference needs the same examples: "
                f"here are {len(self.stats)} and {len(other.stats)}"
            )

        def score_difference(sums: np.ndarray, other_sums: np.ndarray) -> np.ndarray:
            return self.score(sums) - other.score(other_sums)

        tables = [self.stats, other.stats]
        low, high = _interval(score_difference, tables, seed=seed, samples=samples, level=level)
        return self.value - other.value, low, high


def _interval(
    score: Callable[..., np.ndarray],
    tables: list[np.ndarray],
    *,
    seed: int,
    samples: int,
    level: float,
) -> tuple[float, float]:
    """Percentiles of `score` of the tables' sums over N examples drawn with replacement.

    tables: [N, K] each; the same examples are drawn of every table.
    """
    if samples < 1 or not 0 < level < 1:
        raise UserError(
            f"samples = {samples} and level = {level}: the bootstrap needs at least 1 sample "
            "and a level between 0 and 1"
        )
    count = len(tables[0])
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // count)  # samples at once
    scores = []
    for start in range(0, samples, chunk):
        counts = _draw_counts(generator, min(chunk, samples - start), count)
        scores.append(score(*(counts @ table for table in tables)))
    low, high = np.quantile(np.concatenate(scores), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _draw_counts(generator: np.random.Generator, samples: int, count: int) -> np.ndarray:
    """float64 [samples, count]: how often each of `count` examples is drawn in `count` draws.

    Four times faster than `Generator.multinomial`.
    """
    first_of_row = count * np.arange(samples)[:, None]
    drawn = generator.integers(count, size=(samples, count)) + first_of_row
    counts = np.bincount(drawn.ravel(), minlength=samples * count)
    return counts.reshape(samples, count).astype(np.float64)


def first_over_second(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 2] of a numerator and a denominator to their ratio [...]."""
    return ratio(sums[..., 0], sums[..., 1])


def _first(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0]


def mean_metric(values: Sequence[float] | np.ndarray) -> Metric:
    """The mean of one number an example, [N]."""
    (column,) = stack_columns(values=values)
    return Metric(np.stack([column, np.ones_like(column)], 1), first_over_second)


def corpus_metric(value: float) -> Metric:
    """A number about all texts at once, which is no sum over examples.

    It has one row, and so no interval.
    """
    return Metric(np.array([[value]], np.float64), _first)


def ratio(a: Any, b: Any) -> np.ndarray:
    """a / b, and 0 where b is not positive."""
    zeros = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)))
    return np.divide(a, b, out=zeros, where=np.asarray(b) > 0)


def check_same_length(**columns: Any) -> None:
    """Raises UserError where the columns differ in length or are empty."""
    sizes = {name: len(column) for name, column in columns.items()}
    if 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise UserError(f"examples: {sizes}; every side needs the same number, at least 1")


def stack_columns(
    low: float = -math.inf, high: float = math.inf, *, kinds: str = "iuf", **columns: Any
) -> list[np.ndarray]:
    """Each of `columns` as an array [N], float64 or int64.

    kinds: NumPy's kinds of numbers that may be there. Raises UserError for others, and for numbers
    that are not finite or not within low and high.
    """
    check_same_length(**columns)
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in kinds:
            what = "number" if "f" in kinds else "integer"
            raise UserError(
                f"{name} has shape {array.shape} and type {array.dtype}: "
                f"must be one {what} an example"
            )
        wrong = np.flatnonzero(~np.isfinite(array) | (array < low) | (array > high))
        if wrong.size:
            raise UserError(
                f"{name}[{wrong[0]}] = {array[wrong[0]]}: must be finite and from {low} to {high}"
            )
    dtype = np.float64 if "f" in kinds else np.int64
    return [array.astype(dtype) for array in arrays.values()]
