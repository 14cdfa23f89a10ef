"""Pairs of answers, one preferred: DPO, IPO, ORPO and KTO. A model is judged on how often it finds the chosen answer likelier, per token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics.bootstrap import Metric, mean_metric
from gptjax.tasks.base import Answer, Example, Task, TokenBudget, completion, fill_template
from gptjax.tokenizer.base import Tokenizer

REJECTED = "{rejected}"
SEGMENTS = {
    "dpo": 2,
    "ipo": 2,
    "orpo": 2,
    "kto": 3,
}  # of an example: chosen, rejected, and for KTO an answer to another prompt
WITH_REFERENCE = ("dpo", "ipo", "kto")


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    """ids: the prompt with the chosen answer, then the prompt with the rejected one; parts: their lengths."""
    rejected = fill_template(config.rejected or REJECTED, row, "task.rejected")
    if not rejected.strip():
        raise UserError(
            f"{row.where}: the rejected answer is empty, so there is nothing to prefer: fill the field or drop the row"
        )
    part = TokenBudget(room.length // SEGMENTS[config.loss], room.policy, room.lead)
    chosen = fill_template(config.completion or PREFERENCE.completion, row, "task.completion")
    if chosen == rejected:
        raise UserError(
            f"{row.where}: the chosen and the rejected answer are the same, so there is nothing to prefer: drop the row"
        )
    texts = [text.strip() if config.template == "chat" else text for text in (chosen, rejected)]
    longest = max(
        len(tokenizer.encode(text)) + 1 for text in texts
    )  # one cut for both, or they would answer different prompts
    first, second = (
        completion(
            config,
            PREFERENCE,
            tokenizer,
            row,
            part,
            references=[chosen],
            answer=text,
            room_for=longest,
        )
        for text in (chosen, rejected)
    )
    if first is None or second is None:
        return None
    ids, learned = (
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.learned, second.learned]),
    )
    changed = {
        "ids": ids,
        "learned": learned,
        "parts": (len(first.ids), len(second.ids)),
        "cut": first.cut or second.cut,
    }
    return Example(**{**vars(first), **changed})


def with_strangers(examples: Sequence[Example], length: int) -> list[Example]:
    """Each example with a third part, its prompt before the next example's chosen answer (cut to a third of a row): KTO's estimate of the divergence."""
    made = []
    for e, other in zip(examples, [*examples[1:], *examples[:1]], strict=True):
        answer = other.ids[other.prompt : other.parts[0]]
        ids = np.concatenate([e.ids[: e.prompt], answer])[: length // 3 + 1]
        learned = np.arange(len(ids)) >= e.prompt
        changed = {
            "ids": np.concatenate([e.ids, ids]),
            "learned": np.concatenate([e.learned, learned]),
            "parts": (*e.parts, len(ids)),
        }
        made.append(Example(**{**vars(e), **changed}))
    return made


def _judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    return {"accuracy": mean_metric(np.array([a.value for a in answers]))}


def _coin(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    return {"coin": [Answer(value=0.5)] * len(examples)}


PREFERENCE = Task("{prompt}", "{chosen}", "accuracy", _judge, _coin)
