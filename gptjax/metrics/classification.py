"""Scores of classes and of numbers: accuracy, F1, correlation, calibration, squared error.

To add a score of classes, write a function of `Counts` and add a row to CLASSIFICATION_SCORES.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import UserError
from gptjax.metrics.bootstrap import Metric, mean_metric, ratio, stack_columns

_BINS = 15  # of the calibration error (Guo et al. 2017)


def confusion(predicted: Any, actual: Any, classes: int) -> np.ndarray:
    """How often each pair of classes occurred, int [C, C]: row = actual class, column = predicted.

    Raises UserError.
    """
    rows, columns = stack_columns(0, classes - 1, kinds="iu", actual=actual, predicted=predicted)
    counts = np.bincount(rows * classes + columns, minlength=classes * classes)
    return counts.reshape(classes, classes)


class Counts(NamedTuple):
    """Of each class, [..., C]: correct predictions of it, all predictions of it, examples of it."""

    correct: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray


def _accuracy(counts: Counts) -> np.ndarray:
    return ratio(counts.correct.sum(-1), counts.actual.sum(-1))


def _f1_macro(counts: Counts) -> np.ndarray:
    """The mean of F1 over all classes, 0 for one that never occurs."""
    return ratio(2 * counts.correct, counts.predicted + counts.actual).mean(-1)


def _mcc(counts: Counts) -> np.ndarray:
    """Matthews' correlation for C classes (Gorodkin 2004), 0 where undefined."""
    covariance = counts.actual.sum(-1) * counts.correct.sum(-1)
    covariance = covariance - (counts.predicted * counts.actual).sum(-1)
    return ratio(covariance, _spread(counts.predicted) * _spread(counts.actual))


def _spread(counts: np.ndarray) -> np.ndarray:
    """0 where one class has all examples."""
    return np.sqrt(np.square(counts.sum(-1)) - np.square(counts).sum(-1))


CLASSIFICATION_SCORES: dict[str, Callable[[Counts], np.ndarray]] = {
    "accuracy": _accuracy,
    "f1_macro": _f1_macro,
    # one class an example: each miss is one false positive and one false negative
    "f1_micro": _accuracy,
    "mcc": _mcc,
}


def _score_counts(score: Callable[[Counts], np.ndarray], sums: np.ndarray) -> np.ndarray:
    return score(Counts(*np.split(sums, 3, axis=-1)))


def classification(
    predicted: Any, actual: Any, classes: int, probabilities: Any = None
) -> dict[str, Metric]:
    """The scores above of classes [N] int; with probabilities [N, C] also calibration_error.

    Raises UserError.
    """
    labels, guesses = stack_columns(0, classes - 1, kinds="iu", actual=actual, predicted=predicted)
    is_actual, is_predicted = np.eye(classes)[labels], np.eye(classes)[guesses]
    stats = np.concatenate([is_actual * is_predicted, is_predicted, is_actual], 1)
    metrics = {}
    for name, score in CLASSIFICATION_SCORES.items():
        metrics[name] = Metric(stats, functools.partial(_score_counts, score))
    if probabilities is not None:
        metrics["calibration_error"] = _calibration_error(probabilities, labels, classes)
    return metrics


def multi_label(predicted: Any, actual: Any) -> dict[str, Metric]:
    """f1_micro, f1_macro and exact_match of sets of labels, bool [N, C]; F1 is 0 of a label that
    is neither there nor predicted.

    Raises UserError.
    """
    predictions, truths = np.asarray(predicted), np.asarray(actual)
    if predictions.shape != truths.shape or predictions.ndim != 2:
        raise UserError(
            f"predicted has shape {predictions.shape} and actual {truths.shape}: "
            "both must be examples by labels"
        )
    stats = np.concatenate([predictions & truths, predictions, truths], 1).astype(np.float64)
    return {
        "f1_micro": Metric(stats, functools.partial(_score_counts, _f1_over_all)),
        "f1_macro": Metric(stats, functools.partial(_score_counts, _f1_macro)),
        "exact_match": mean_metric((predictions == truths).all(1).astype(np.float64)),
    }


def _f1_over_all(counts: Counts) -> np.ndarray:
    """F1 of all decisions together, 0 where nothing is there or predicted."""
    total = counts.predicted.sum(-1) + counts.actual.sum(-1)
    return ratio(2 * counts.correct.sum(-1), total)


def _calibration_error(probabilities: Any, actual: np.ndarray, classes: int) -> Metric:
    """|confidence - accuracy| of 15 equal bins of the top probability, weighted by their sizes.

    Bin m is (m - 1, m] / 15 (Guo et al. 2017).
    """
    array = np.asarray(probabilities, np.float64)
    if array.shape != (len(actual), classes):
        raise UserError(
            f"probabilities has shape {array.shape}: "
            f"must be {(len(actual), classes)}, examples by classes"
        )
    # not the opposite comparisons: NaN is wrong too; bfloat16 sums to about 1
    is_right = (array >= 0).all(1) & (np.abs(array.sum(1) - 1) < 1e-2)
    wrong = np.flatnonzero(~is_right)
    if wrong.size:
        raise UserError(
            f"probabilities[{wrong[0]}] = {array[wrong[0]].tolist()!r:.80}: "
            "must be at least 0 and sum to 1"
        )
    confidence = array.max(1)
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    gaps = np.eye(_BINS)[bins] * (confidence - (array.argmax(1) == actual))[:, None]
    return Metric(np.concatenate([gaps, np.ones((len(gaps), 1))], 1), _mean_absolute_gap)


def _mean_absolute_gap(sums: np.ndarray) -> np.ndarray:
    """Sums [..., bins + 1] of the gaps of each bin, then of the examples."""
    return ratio(np.abs(sums[..., :-1]).sum(-1), sums[..., -1])


def regression(predicted: Any, actual: Any) -> dict[str, Metric]:
    """mse and pearson (the correlation, 0 where one side is constant) of numbers [N]."""
    x, y = stack_columns(predicted=predicted, actual=actual)
    # far from zero, n * sum(uu) - sum(u)^2 would cancel;
    # the median of equal numbers is exact, their mean may not be
    u, v = x - np.median(x), y - np.median(y)
    stats = np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], 1)
    return {"mse": mean_metric(np.square(x - y)), "pearson": Metric(stats, _pearson)}


def _pearson(sums: np.ndarray) -> np.ndarray:
    """The correlation of u and v from the sums of 1, u, v, uu, vv and uv."""
    n, su, sv, suu, svv, suv = np.moveaxis(sums, -1, 0)
    return ratio(n * suv - su * sv, _deviation(n, su, suu) * _deviation(n, sv, svv))


def _deviation(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """n standard deviations; 0 of a constant.

    What a constant leaves is rounding: a real spread around the median is at least half of
    n * squares.
    """
    return np.sqrt(np.maximum(n * squares * (1 - 1e-14) - total * total, 0.0))
