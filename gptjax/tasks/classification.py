"""Texts to classes: by a head on the last token (GPT-2 style), or by writing the label.

A pair of texts is a prompt with two fields, such as '{premise}\n{hypothesis}'.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import classification as classification_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, AnsweredBy, Baselines, Example, Rendering, Task
from gptjax.tasks.rendering import completion_example, fill_template, head_example


def label_of(config: TaskConfig, row: Record) -> str:
    """The row's class as text. Raises UserError where it has none."""
    value = row.value(config.label, setting="task.label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list | tuple | np.ndarray):
        raise UserError(
            f"{row.where}: task.label = {config.label!r} is a list, {value!r:.80}: "
            "several labels a text are task.name = 'multi_label'"
        )
    if not isinstance(value, str | int | bool) or value == "":
        raise UserError(
            f"{row.where} has no label under task.label = {config.label!r}; "
            f"fields are {', '.join(map(str, row.fields))}"
        )
    return str(value)


def labels_of(config: TaskConfig, rows: Sequence[Record]) -> tuple[str, ...]:
    """task.labels, or the classes of the training rows, sorted.

    Raises UserError where there is one class only.
    """
    labels = sorted({label_of(config, row) for row in rows}, key=_sort_key)
    if len(labels) < 2:
        raise UserError(
            f"task.label = {config.label!r}: the training split has one class only, "
            f"{labels[0]!r}: there is nothing to tell apart"
        )
    return config.labels or tuple(labels)


def _sort_key(label: str) -> tuple[int, str]:
    """Numbers first, by value; then words."""
    return (len(label), label) if label.isdigit() else (1 << 30, label)


def label_words(config: TaskConfig, labels: Sequence[str]) -> Sequence[str]:
    """What is written for each label."""
    return config.words or labels


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """The text for a head, or followed by the word for its class."""
    config, labels = rendering.config, rendering.labels
    label = label_of(config, row)
    if label not in labels:
        raise UserError(f"{row.where}: {unknown_name('label', label, list(labels))}")
    number = labels.index(label)
    if config.method == "head":
        return head_example(rendering, row, label=number, reference=label)
    word = label_words(config, labels)[number]
    example = completion_example(rendering, row, references=[label], answer=" " + word)
    return dataclasses.replace(example, label=float(number)) if example else None


def _texts(config: TaskConfig, row: Record) -> list[str]:
    prompt = fill_template(config.prompt, row, "task.prompt")
    if config.method == "head":
        return [prompt]
    return [f"{prompt} {row.fields.get(config.label, '')}"]


def answered_by(config: TaskConfig) -> AnsweredBy:
    return "head" if config.method == "head" else "likelihood"


def _adapt(config: TaskConfig, has_head: bool) -> TaskConfig:
    """A checkpoint without a head answers by the likelihood of the labels as text."""
    return dataclasses.replace(config, method="head" if has_head else "text")


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """Accuracy, F1, Matthews' correlation and, with probabilities, the calibration error."""
    probabilities = None
    if answers and answers[0].probabilities:
        probabilities = np.array([answer.probabilities for answer in answers])
    return classification_metrics.classification(
        np.array([int(answer.value) for answer in answers]),
        np.array([int(example.label or 0) for example in examples]),
        len(labels),
        probabilities,
    )


def most_frequent(examples: Sequence[Example], train: Sequence[Example]) -> list[Answer]:
    """For each example, the label that the training split has most of."""
    label, _ = collections.Counter(example.label for example in train).most_common(1)[0]
    return [Answer(value=float(label or 0))] * len(examples)


def _majority(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    return {"majority": most_frequent(examples, train)}


CLASSIFICATION = Task(
    make_example,
    evaluate,
    headline="accuracy",
    prompt="{text}",
    labels=labels_of,
    texts=_texts,
    answered_by=answered_by,
    adapt=_adapt,
    baselines=_majority,
)
