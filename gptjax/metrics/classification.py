"""TODO docstring."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.metrics.bootstrap import Metric, mean_metric, ratio, stack_columns

_BINS = 15  # of the calibration error (Guo et al. 2017)


def confusion(predicted: Any, actual: Any, classes: int) -> np.ndarray:
    """How often each pair of classes occurred, int [C, C]: rows are the actual class, columns the predicted one."""
    rows, columns = stack_columns(0, classes - 1, kinds="iu", actual=actual, predicted=predicted)
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(
        classes, classes
    )


def classification(
    predicted: Any, actual: Any, classes: int, probabilities: Any = None
) -> dict[str, Metric]:
    """accuracy, f1_macro, f1_micro and mcc of classes [N] int; with probabilities [N, C] also calibration_error.

    Macro F1 is the mean over all classes, 0 for one that never occurs. mcc: Matthews' correlation for C classes (Gorodkin 2004), 0 where undefined.
    """
    labels = stack_columns(0, classes - 1, kinds="iu", actual=actual, predicted=predicted)
    truth, guess = (np.eye(classes)[column] for column in labels)
    stats = np.concatenate([truth * guess, guess, truth], 1)
    hits, guessed, true = (lambda s, i=i: s[..., i * classes : (i + 1) * classes] for i in range(3))
    spread = lambda a: np.sqrt(
        np.square(a.sum(-1)) - np.square(a).sum(-1)
    )  # 0 where one class has all
    covariance = lambda s: true(s).sum(-1) * hits(s).sum(-1) - (guessed(s) * true(s)).sum(-1)
    accuracy = Metric(stats, lambda s: ratio(hits(s).sum(-1), true(s).sum(-1)))
    found = {
        "accuracy": accuracy,
        "f1_macro": Metric(stats, lambda s: ratio(2 * hits(s), guessed(s) + true(s)).mean(-1)),
        "f1_micro": accuracy,  # one class an example: each miss is one false positive and one false negative
        "mcc": Metric(stats, lambda s: ratio(covariance(s), spread(guessed(s)) * spread(true(s)))),
    }
    return (
        found
        if probabilities is None
        else found | {"calibration_error": _calibration_error(probabilities, labels[0], classes)}
    )


def _calibration_error(probabilities: Any, actual: np.ndarray, classes: int) -> Metric:
    """|confidence - accuracy| of 15 equal bins (m-1, m] / 15 of the top probability, weighted by size (Guo et al. 2017)."""
    array = np.asarray(probabilities, np.float64)
    if array.shape != (len(actual), classes):
        raise UserError(
            f"probabilities has shape {array.shape}: must be {(len(actual), classes)}, examples by classes"
        )
    wrong = np.flatnonzero(
        ~((array >= 0).all(1) & (np.abs(array.sum(1) - 1) < 1e-2))
    )  # so that NaN is wrong too; bfloat16 sums to about 1
    if wrong.size:
        raise UserError(
            f"probabilities[{wrong[0]}] = {array[wrong[0]].tolist()!r:.80}: must be at least 0 and sum to 1"
        )
    confidence = array.max(1)
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    gaps = np.eye(_BINS)[bins] * (confidence - (array.argmax(1) == actual))[:, None]
    return Metric(
        np.concatenate([gaps, np.ones((len(gaps), 1))], 1),
        lambda s: ratio(np.abs(s[..., :-1]).sum(-1), s[..., -1]),
    )


def regression(predicted: Any, actual: Any) -> dict[str, Metric]:
    """mse and pearson (the correlation, 0 where one side is constant) of numbers [N]."""
    x, y = stack_columns(predicted=predicted, actual=actual)
    # far from zero, n * sum(uu) - sum(u)^2 would cancel; the median of equal numbers is exact, their mean may not be
    u, v = x - np.median(x), y - np.median(y)

    def pearson(s: np.ndarray) -> np.ndarray:
        n, su, sv, suu, svv, suv = np.moveaxis(s, -1, 0)
        # what a constant leaves is rounding: a real spread around the median is at least half of n * sum(uu)
        spread = lambda first, second: np.sqrt(
            np.maximum(n * second * (1 - 1e-14) - first * first, 0.0)
        )
        return ratio(n * suv - su * sv, spread(su, suu) * spread(sv, svv))

    return {
        "mse": mean_metric(np.square(x - y)),
        "pearson": Metric(np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], 1), pearson),
    }
