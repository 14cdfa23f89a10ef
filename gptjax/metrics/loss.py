"""Scores of a language model's loss: per token, as perplexity, and in bits per byte."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.metrics.bootstrap import (
    Metric,
    check_same_length,
    first_over_second,
    ratio,
    stack_columns,
)

_MAX_LOSS = 700.0  # exp of more is infinite


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(ratio(sums[..., 0], sums[..., 1]), _MAX_LOSS))


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / math.log(2) / np.maximum(sums[..., 2], 1.0)


# Functions of the sums of loss, weight and bytes.
LOSS_SCORES = {
    "loss": first_over_second,
    "perplexity": _perplexity,
    "bits_per_byte": _bits_per_byte,
}


def token_loss(sums: Any, weights: Any, bytes: Any) -> dict[str, Metric]:
    """The scores above of examples, all [N].

    sums: losses in nats; weights: loss weights; bytes: UTF-8 bytes of the targets. Raises
    UserError.
    """
    check_same_length(sums=sums, weights=weights, bytes=bytes)
    columns = stack_columns(sums=sums) + stack_columns(0.0, weights=weights, bytes=bytes)
    stats = np.stack(columns, 1)
    if not stats[:, 1].any():
        raise UserError(f"weights are 0 in all {len(stats)} examples: there is no token to score")
    return {name: Metric(stats, score) for name, score in LOSS_SCORES.items()}
