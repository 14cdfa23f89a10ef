"""Questions about a text, answered in words of it; exact match and F1 by SQuAD's or CMRC's rules.

The answer is written. With task.extract, the words of the text that resemble it most replace it.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Rendering, Task, most_frequent
from gptjax.tasks.rendering import completion_example, fill_template, names_in, template_texts

_WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # Chinese characters one by one
_EXTRA_WORDS = 2  # by which an extracted span may be longer than the answer


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """SQuAD's `answers` are equal references; the first is learned. None: the text does not say."""
    row, references = answered_row(rendering.config, row)
    return completion_example(rendering, row, references=references, allow_empty=not references)


def answered_row(config: TaskConfig, row: Record) -> tuple[Record, list[str]]:
    """(the row with the learned answer in the completion's field, the references).

    `answers` may be nested as in SQuAD's files, {"text": [...]}, or a flat list. config: with its
    templates. Raises UserError where the row says nothing of an answer.
    """
    names = names_in(config.completion, "task.completion")
    name = names[-1] if names and "answer" not in names else "answer"
    answer, answers = row.fields.get(name), row.fields.get("answers")
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if (
        not isinstance(answers, list)
        or not all(isinstance(text, str) for text in answers)
        or (not answers and answer not in (None, ""))
    ):
        return row, [fill_template("{" + name + "}", row, "task.completion")]
    if not isinstance(answer, str | int | float):
        row = dataclasses.replace(row, fields={**row.fields, name: answers[0] if answers else ""})
    return row, answers


def _texts(config: TaskConfig, row: Record) -> list[str]:
    return template_texts(config, answered_row(config, row)[0], has_head=False)


def extract(context: str, answer: str) -> str:
    """The span of the context whose words share most with the answer's.

    "Most" is by F1, the earliest of equals, at most two words longer than the answer. The answer
    itself where it is in the context, or where no word is.
    """
    if answer in context:
        return answer
    words = list(_WORDS.finditer(context))
    answer_words = collections.Counter(w.group().lower() for w in _WORDS.finditer(answer))
    count = answer_words.total()
    best_f1, best_span = 0.0, answer
    for first in range(len(words)):
        shared = 0
        span_words = collections.Counter[str]()
        for last in range(first, min(first + count + _EXTRA_WORDS, len(words))):
            word = words[last].group().lower()
            span_words[word] += 1
            shared += span_words[word] <= answer_words[word]
            f1 = 2 * shared / (last - first + 1 + count)
            if f1 > best_f1:
                best_f1 = f1
                best_span = context[words[first].start() : words[last].end()]
    return best_span


def extract_answers(
    config: TaskConfig, examples: Sequence[Example], answers: list[Answer]
) -> list[Answer]:
    """With task.extract, the answers in words of their texts. An empty answer stays empty.

    The text is the field `context`, or the prompt's first field.
    """
    if not config.extract:
        return answers
    extracted = []
    for example, answer in zip(examples, answers, strict=True):
        context = str(example.fields.get("context") or example.source)
        text = extract(context, answer.text) if answer.text else ""
        extracted.append(dataclasses.replace(answer, text=text))
    return extracted


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """Exact match and F1."""
    return text_metrics.squad(
        [answer.text for answer in answers],
        [list(example.references) for example in examples],
        language="zh" if config.language == "zh" else "en",
    )


QA = Task(
    make_example,
    evaluate,
    headline="f1",
    prompt="{context}\n\nQuestion: {question}\nAnswer:",
    completion=" {answer}",
    texts=_texts,
    postprocess=extract_answers,
    baselines=most_frequent,
)
