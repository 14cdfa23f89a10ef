"""Sentences to another language; BLEU and chrF, and the source itself as the answer to beat."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Task, TokenBudget, completion, copied, names_in
from gptjax.tokenizer.base import Tokenizer


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    names = names_in(config.completion or TRANSLATION.completion, "task.completion")
    return completion(
        config,
        TRANSLATION,
        tokenizer,
        row,
        room,
        references=[row.text(name, knob="task.completion") for name in names[:1]],
    )


def judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    words = "zh" if config.language == "zh" else "13a"
    return text_metrics.translation(
        [a.text for a in answers], [list(e.references) for e in examples], tokenize=words
    )


TRANSLATION = Task("{source} =", " {target}", "chrf", judge, copied, "sacrebleu")
