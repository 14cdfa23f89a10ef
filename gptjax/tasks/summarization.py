"""Long texts to short ones; ROUGE, and the first sentence as the answer to beat."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Task, TokenBudget, completion, names_in
from gptjax.tokenizer.base import Tokenizer


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    """Where the field of the summary is a list, its texts are references of equal right, and the first is learned."""
    names = names_in(config.completion or SUMMARIZATION.completion, "task.completion")
    several = row.fields.get(names[0]) if names else None
    if isinstance(several, list) and several and all(isinstance(s, str) for s in several):
        row = Record(row.where, {**row.fields, names[0]: several[0]})
        return completion(config, SUMMARIZATION, tokenizer, row, room, references=several)
    return completion(
        config,
        SUMMARIZATION,
        tokenizer,
        row,
        room,
        references=[row.text(name, knob="task.completion") for name in names],
    )


def judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    return text_metrics.rouge(
        [a.text for a in answers],
        [list(e.references) for e in examples],
        characters=config.language == "zh",
    )


def first_sentence(text: str) -> str:
    """Up to the first mark that ends a sentence."""
    found = re.match(r".+?(?:[.!?](?=\s)|[。！？]|$)", text.strip(), re.DOTALL)
    return found.group() if found else text


def _lead(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    return {"lead-1": [Answer(first_sentence(e.source)) for e in examples]}


SUMMARIZATION = Task("{document}\n\nTL;DR:", " {summary}", "rougeL", judge, _lead)
