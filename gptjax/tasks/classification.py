"""Texts to classes or a number: by a head on the last token (GPT-2 style), or for classes by writing the label.

A pair of texts is a prompt with two fields, such as '{premise}\n{hypothesis}'.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import classification as classification_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Task, TokenBudget, completion, prompt_only
from gptjax.tokenizer.base import Tokenizer


def label_of(config: TaskConfig, row: Record) -> str:
    value = row.fields.get(config.label)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | bool) or value == "":
        raise UserError(
            f"{row.where} has no label under task.label = {config.label!r}; fields are {', '.join(map(str, row.fields))}"
        )
    return str(value)


def labels_of(config: TaskConfig, rows: Iterable[Record]) -> tuple[str, ...]:
    """task.labels, or the classes of the training rows, sorted. Raises UserError where there is one class only."""
    if config.name == "regression":
        return (config.label,)
    found = sorted(
        {label_of(config, row) for row in rows},
        key=lambda s: (len(s), s) if s.isdigit() else (1 << 30, s),
    )
    if len(found) < 2:
        raise UserError(
            f"task.label = {config.label!r}: the training split has one class only, {found[0]!r}: there is nothing to tell apart"
        )
    return config.labels or tuple(found)


def words_of(config: TaskConfig, labels: Sequence[str]) -> Sequence[str]:
    return config.words or labels


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    name = label_of(config, row)
    if name not in labels:
        raise UserError(f"{row.where}: {unknown_name('label', name, list(labels))}")
    if config.method == "head":
        return prompt_only(
            config, CLASSIFICATION, tokenizer, row, room, label=labels.index(name), reference=name
        )
    word = words_of(config, labels)[labels.index(name)]
    found = completion(
        config, CLASSIFICATION, tokenizer, row, room, references=[name], answer=" " + word
    )
    return found and Example(**{**vars(found), "label": float(labels.index(name))})


def _judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    actual = np.array([int(e.label or 0) for e in examples])
    probabilities = (
        np.array([a.probabilities for a in answers])
        if answers and answers[0].probabilities
        else None
    )
    return classification_metrics.classification(
        np.array([int(a.value) for a in answers]), actual, len(labels), probabilities
    )


def _majority(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    """The class that the training split holds most of."""
    value, _ = collections.Counter(e.label for e in train).most_common(1)[0]
    return {"majority": [Answer(value=float(value or 0))] * len(examples)}


CLASSIFICATION = Task("{text}", "", "accuracy", _judge, _majority)
