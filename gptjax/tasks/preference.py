"""Pairs of answers, one of them preferred: DPO, IPO, ORPO and KTO.

A model is evaluated on how often it finds the chosen answer likelier than the other, per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config, TaskConfig
from gptjax.data.records import Record
from gptjax.metrics.bootstrap import Metric, mean_metric
from gptjax.tasks.base import (
    Answer,
    AnsweredBy,
    Baselines,
    Example,
    Rendering,
    Task,
    TokenBudget,
    needs_checkpoint,
)
from gptjax.tasks.rendering import completion_example, fill_template

REJECTED = "{rejected}"
# Segments of an example by task.loss: chosen, rejected, and for KTO an answer to another prompt.
SEGMENTS = {"dpo": 2, "ipo": 2, "orpo": 2, "kto": 3}
WITH_REFERENCE = ("dpo", "ipo", "kto")


def check(config: Config) -> list[str]:
    faults = []
    if config.task.loss == "kto" and config.train.grad_accum_steps > 1:
        faults.append(
            f"train.grad_accum_steps = {config.train.grad_accum_steps} changes KTO's loss, "
            "which compares the answers of a batch with one another: set 1"
        )
    return faults + needs_checkpoint(config)


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """ids: the prompt with the chosen answer, then the prompt with the rejected one."""
    config, budget = rendering.config, rendering.budget
    rejected = fill_template(config.rejected or REJECTED, row, "task.rejected")
    if not rejected.strip():
        raise UserError(
            f"{row.where}: the rejected answer is empty, so there is nothing to prefer: "
            "fill the field or drop the row"
        )
    chosen = fill_template(config.completion, row, "task.completion")
    if chosen == rejected:
        raise UserError(
            f"{row.where}: the chosen and the rejected answer are the same, "
            "so there is nothing to prefer: drop the row"
        )
    length = budget.length // SEGMENTS[config.loss]
    rendering = dataclasses.replace(
        rendering, budget=TokenBudget(length, budget.policy, budget.lead)
    )
    texts = [chosen, rejected]
    if config.template == "chat":
        texts = [text.strip() for text in texts]
    # one cut for both, or they would answer different prompts
    longest = max(len(rendering.tokenizer.encode(text)) + 1 for text in texts)
    parts = []
    for text in (chosen, rejected):
        part = completion_example(
            rendering, row, references=[chosen], answer=text, longest_answer=longest
        )
        if part is None:
            return None
        parts.append(part)
    return dataclasses.replace(
        parts[0],
        ids=np.concatenate([part.ids for part in parts]),
        learned=np.concatenate([part.learned for part in parts]),
        parts=tuple(len(part.ids) for part in parts),
        cut=any(part.cut for part in parts),
    )


def add_unrelated_answers(config: Config, examples: list[Example]) -> list[Example]:
    """For KTO, each example with a third part: its prompt before the next example's chosen answer.

    KTO estimates the divergence from the reference on them. A part is cut to a third of a row.
    """
    if config.task.loss != "kto":
        return examples
    limit = config.length // SEGMENTS["kto"] + 1  # the last id is only a target
    extended = []
    for i, example in enumerate(examples):
        other = examples[(i + 1) % len(examples)]
        answer = other.ids[other.prompt : other.parts[0]]
        ids = np.concatenate([example.ids[: example.prompt], answer])[:limit]
        learned = np.arange(len(ids)) >= example.prompt
        extended.append(
            dataclasses.replace(
                example,
                ids=np.concatenate([example.ids, ids]),
                learned=np.concatenate([example.learned, learned]),
                parts=(*example.parts, len(ids)),
            )
        )
    return extended


def _needs_reference(config: TaskConfig) -> bool:
    return config.loss in WITH_REFERENCE


def _answered_by(config: TaskConfig) -> AnsweredBy:
    return "preference"


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """The share of pairs whose chosen answer is likelier."""
    return {"accuracy": mean_metric(np.array([answer.value for answer in answers]))}


def _coin(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    return {"coin": [Answer(value=0.5)] * len(examples)}


PREFERENCE = Task(
    make_example,
    evaluate,
    headline="accuracy",
    prompt="{prompt}",
    completion="{chosen}",
    check=check,
    finish=add_unrelated_answers,
    objective="preference",
    counts_correct=True,
    needs_reference=_needs_reference,
    answered_by=_answered_by,
    baselines=_coin,
)
