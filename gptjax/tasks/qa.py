"""Questions about a text, answered in words of it; exact match and F1 by SQuAD's rules, or CMRC's for Chinese.

The answer is written. With task.extract, the words of the text that resemble it most are given in its place.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import (
    Answer,
    Example,
    Task,
    TokenBudget,
    completion,
    fill_template,
    most_frequent,
    names_in,
)
from gptjax.tokenizer.base import Tokenizer

_WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # Chinese characters one by one


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    """SQuAD's `answers`, nested as in its files or flat, are references of equal right, and the first is learned; none: the text does not say."""
    row, references = answered(config, row)
    return completion(config, QA, tokenizer, row, room, references=references, empty=not references)


def answered(config: TaskConfig, row: Record) -> tuple[Record, list[str]]:
    """(the row with the text that is learned in the completion's field, the references). Raises UserError where it says nothing of an answer."""
    names = names_in(config.completion or QA.completion, "task.completion")
    name = names[-1] if names and "answer" not in names else "answer"
    answers, given = row.fields.get("answers"), row.fields.get(name)
    answers = answers.get("text") if isinstance(answers, Mapping) else answers
    if (
        not isinstance(answers, list)
        or not all(isinstance(a, str) for a in answers)
        or (not answers and given not in (None, ""))
    ):
        return row, [fill_template(f"{{{name}}}", row, "task.completion")]
    if not isinstance(given, str | int | float):
        row = Record(row.where, {**row.fields, name: answers[0] if answers else ""})
    return row, answers


def extract(context: str, answer: str) -> str:
    """The span of the context whose words share most with the answer's (F1; the earliest of equals), at most two words longer."""
    if answer in context:
        return answer
    words, wanted = (
        list(_WORDS.finditer(context)),
        collections.Counter(w.group().lower() for w in _WORDS.finditer(answer)),
    )
    best, found = 0.0, answer
    for i in range(len(words)):
        shared, have = 0, collections.Counter[str]()
        for j in range(i, min(i + wanted.total() + 2, len(words))):
            word = words[j].group().lower()
            have[word] += 1
            shared += have[word] <= wanted[word]
            if (f1 := 2 * shared / (j - i + 1 + wanted.total())) > best:
                best, found = f1, context[words[i].start() : words[j].end()]
    return found


def extracted(examples: Sequence[Example], answers: Sequence[Answer]) -> list[Answer]:
    """The answers in words of their texts: of the field `context`, or of the prompt's first field. No answer stays none."""
    contexts = [str(e.fields.get("context") or e.source) for e in examples]
    return [
        dataclasses.replace(a, text=extract(context, a.text)) if a.text else a
        for context, a in zip(contexts, answers, strict=True)
    ]


def _judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    return text_metrics.squad(
        [a.text for a in answers],
        [list(e.references) for e in examples],
        language="zh" if config.language == "zh" else "en",
    )


QA = Task("{context}\n\nQuestion: {question}\nAnswer:", " {answer}", "f1", _judge, most_frequent)
