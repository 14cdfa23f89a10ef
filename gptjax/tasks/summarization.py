"""Long texts to short ones; ROUGE, and the first sentence as the answer to beat."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Baselines, Example, Rendering, Task
from gptjax.tasks.rendering import completion_example, names_in

# Up to the first mark that ends a sentence, in English or Chinese.
_FIRST_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)|[。！？]|$)", re.DOTALL)


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """Where the summary's field is a list, its texts are equal references; the first is learned."""
    names = names_in(rendering.config.completion, "task.completion")
    summaries = row.fields.get(names[0]) if names else None
    if isinstance(summaries, list) and summaries and all(isinstance(s, str) for s in summaries):
        row = dataclasses.replace(row, fields={**row.fields, names[0]: summaries[0]})
        references = summaries
    else:
        references = [row.text(name, setting="task.completion") for name in names]
    return completion_example(rendering, row, references=references)


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """ROUGE-1, ROUGE-2 and ROUGE-L; of Chinese over characters."""
    return text_metrics.rouge(
        [answer.text for answer in answers],
        [list(example.references) for example in examples],
        characters=config.language == "zh",
    )


def first_sentence(text: str) -> str:
    """The text up to the first mark that ends a sentence."""
    sentence = _FIRST_SENTENCE.match(text.strip())
    return sentence.group() if sentence else text


def _lead(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    return {"lead-1": [Answer(first_sentence(example.source)) for example in examples]}


SUMMARIZATION = Task(
    make_example,
    evaluate,
    headline="rougeL",
    prompt="{document}\n\nTL;DR:",
    completion=" {summary}",
    baselines=_lead,
)
