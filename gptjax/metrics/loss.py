"""TODO docstring."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.metrics.bootstrap import Metric, check_same_length, ratio, stack_columns


def token_loss(sums: Any, weights: Any, bytes: Any) -> dict[str, Metric]:
    """loss per token, perplexity and bits_per_byte of examples with loss `sums` (nats), loss `weights` and UTF-8 `bytes` of the targets, each [N]."""
    check_same_length(sums=sums, weights=weights, bytes=bytes)
    stats = np.stack(stack_columns(sums=sums) + stack_columns(0.0, weights=weights, bytes=bytes), 1)
    if not stats[:, 1].any():
        raise UserError(f"weights are 0 in all {len(stats)} examples: there is no token to score")
    loss = lambda s: ratio(s[..., 0], s[..., 1])
    return {
        "loss": Metric(stats, loss),
        "perplexity": Metric(stats, lambda s: np.exp(np.minimum(loss(s), 700.0))),
        "bits_per_byte": Metric(
            stats, lambda s: s[..., 0] / math.log(2) / np.maximum(s[..., 2], 1.0)
        ),
    }
