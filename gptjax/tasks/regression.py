"""Texts to a number: a head on the last token predicts the field task.label."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config, TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import classification as classification_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, AnsweredBy, Baselines, Example, Rendering, Task
from gptjax.tasks.rendering import head_example


def check(config: Config) -> list[str]:
    if config.task.method == "head":
        return []
    return ["task.method = 'text' is for classification: a number needs the head"]


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """The text with its number. Raises UserError where the field is no finite number."""
    name = rendering.config.label
    value = row.value(name, setting="task.label")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{row.where}: task.label = {name!r} is {value!r}, which is no number")
    return head_example(rendering, row, label=number, reference=str(number))


def _labels(config: TaskConfig, rows: Sequence[Record]) -> tuple[str, ...]:
    """The name of the one number that the head predicts."""
    return (config.label,)


def _answered_by(config: TaskConfig) -> AnsweredBy:
    return "head"


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """Mean squared error and Pearson's correlation."""
    return classification_metrics.regression(
        np.array([answer.value for answer in answers]),
        np.array([float(example.label or 0) for example in examples]),
    )


def _mean(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    """The mean of the training split."""
    mean = float(np.mean([example.label for example in train]))
    return {"mean": [Answer(value=mean)] * len(examples)}


REGRESSION = Task(
    make_example,
    evaluate,
    headline="pearson",
    prompt="{text}",
    check=check,
    labels=_labels,
    label_dtype=np.float32,
    problem="regression",
    answered_by=_answered_by,
    baselines=_mean,
)
