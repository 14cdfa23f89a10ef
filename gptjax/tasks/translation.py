"""Sentences to another language; BLEU and chrF, and the source itself as the answer to beat."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Rendering, Task, copy_source
from gptjax.tasks.rendering import completion_example, names_in


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """The source, then its translation. The completion's first field is the reference."""
    names = names_in(rendering.config.completion, "task.completion")
    references = [row.text(name, setting="task.completion") for name in names[:1]]
    return completion_example(rendering, row, references=references)


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """BLEU and chrF by sacrebleu."""
    return text_metrics.translation(
        [answer.text for answer in answers],
        [list(example.references) for example in examples],
        tokenize="zh" if config.language == "zh" else "13a",
    )


TRANSLATION = Task(
    make_example,
    evaluate,
    headline="chrf",
    prompt="{source} =",
    completion=" {target}",
    baselines=copy_source,
    package="sacrebleu",
)
