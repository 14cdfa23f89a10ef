"""TODO docstring."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import classification as classification_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Task, TokenBudget, prompt_only
from gptjax.tokenizer.base import Tokenizer


def number_example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    try:
        value = float(row.fields.get(config.label, "nothing"))
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{row.where}: task.label = {config.label!r} is {row.fields.get(config.label)!r}, which is no number"
        )
    return prompt_only(config, REGRESSION, tokenizer, row, room, label=value, reference=str(value))


def _judge_numbers(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    return classification_metrics.regression(
        np.array([a.value for a in answers]), np.array([float(e.label or 0) for e in examples])
    )


def _mean(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    return {"mean": [Answer(value=float(np.mean([e.label for e in train])))] * len(examples)}


REGRESSION = Task("{text}", "", "pearson", _judge_numbers, _mean)
