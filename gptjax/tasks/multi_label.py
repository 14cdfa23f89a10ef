"""Texts to any number of classes: a head on the last token gives each label a probability.

The field task.label holds a list of labels, which may be empty. As a target of training, the set of
a row is one number: bit i says whether the row has label i.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config, TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import classification as classification_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, AnsweredBy, Baselines, Example, Rendering, Task
from gptjax.tasks.classification import most_frequent
from gptjax.tasks.rendering import head_example

MOST_LABELS = 31  # bits of a target


def check(config: Config) -> list[str]:
    if config.task.method == "head":
        return []
    return ["task.method = 'text' is for one class: several labels need the head"]


def row_labels(config: TaskConfig, row: Record) -> tuple[str, ...]:
    """The row's labels as texts. Raises UserError where the field is no list of them."""
    values = row.fields.get(config.label)
    if not isinstance(values, list | tuple | np.ndarray):
        raise UserError(
            f"{row.where}: task.label = {config.label!r} is {values!r:.80}, which is no list of "
            "labels (one class a row is task.name = 'classification')"
        )
    names = []
    for value in values:
        if not isinstance(value, str | int | np.integer) or value == "":
            raise UserError(f"{row.where}: task.label = {config.label!r} holds {value!r:.80}")
        names.append(str(value))
    return tuple(names)


def labels_of(config: TaskConfig, rows: Sequence[Record]) -> tuple[str, ...]:
    """task.labels, or all that the training rows have, sorted. Raises UserError."""
    labels: set[str] = set()
    for row in rows:
        labels.update(row_labels(config, row))
    names = config.labels or tuple(sorted(labels))
    if not names:
        raise UserError(f"task.label = {config.label!r}: no row of the training split has a label")
    if len(names) > MOST_LABELS:
        raise UserError(
            f"task.label = {config.label!r}: {len(names)} labels are more than the {MOST_LABELS} "
            "that can be learned at once: take the rare ones out of the rows"
        )
    return names


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """The text with the set of its labels. Raises UserError for a label that is not known."""
    names = row_labels(rendering.config, row)
    for name in names:
        if name not in rendering.labels:
            raise UserError(f"{row.where}: {unknown_name('label', name, list(rendering.labels))}")
    bits = sum(1 << rendering.labels.index(name) for name in set(names))
    return head_example(rendering, row, label=float(bits), reference=", ".join(names))


def answer_of(probabilities: np.ndarray, labels: Sequence[str]) -> Answer:
    """The labels that are likelier than not, of probabilities [C]."""
    chosen = probabilities > 0.5
    text = ", ".join(label for label, is_chosen in zip(labels, chosen, strict=True) if is_chosen)
    bits = sum(1 << int(i) for i in np.flatnonzero(chosen))
    return Answer(text, float(bits), tuple(map(float, probabilities)))


def _sets(values: Sequence[float], count: int) -> np.ndarray:
    """bool [N, C] of sets of labels as numbers."""
    return (np.array(values, np.int64)[:, None] >> np.arange(count)) % 2 == 1


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """F1 over all labels of all texts, the mean of F1 by label, and texts with all labels right."""
    return classification_metrics.multi_label(
        _sets([answer.value for answer in answers], len(labels)),
        _sets([example.label or 0 for example in examples], len(labels)),
    )


def _answered_by(config: TaskConfig) -> AnsweredBy:
    return "head"


def _commonest(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    return {"most frequent set": most_frequent(examples, train)}


MULTI_LABEL = Task(
    make_example,
    evaluate,
    headline="f1_micro",
    prompt="{text}",
    check=check,
    labels=labels_of,
    problem="multi_label_classification",
    answered_by=_answered_by,
    baselines=_commonest,
)
