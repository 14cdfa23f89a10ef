"""Questions about a text, answered in words of it; exact match and F1 by SQuAD's rules, or CMRC's for Chinese.

The answer is written. With task.extract, the words of the text that resemble it most are given in its place.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from gptjax import scores
from gptjax.config import TaskConfig
from gptjax.data.rows import Row
from gptjax.scores import Metric
from gptjax.tasks.base import Answer, Example, Kind, Room, completion, most_frequent
from gptjax.tokenizer import Tokenizer

_WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # Chinese characters one by one


def example(config: TaskConfig, tokenizer: Tokenizer, row: Row, room: Room, labels: Sequence[str]) -> Example | None:
    answers = row.fields.get("answers")
    references = [a for a in answers if isinstance(a, str)] if isinstance(answers, list) else []
    return completion(config, QA, tokenizer, row, room, references=references or [row.text("answer", knob="task.completion")])


def extract(context: str, answer: str) -> str:
    """The span of the context whose words share most with the answer's (F1; the earliest of equals), at most two words longer."""
    if answer in context:
        return answer
    words, wanted = list(_WORDS.finditer(context)), collections.Counter(w.group().lower() for w in _WORDS.finditer(answer))
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


def _judge(config: TaskConfig, labels: Sequence[str], examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Metric]:
    texts = [extract(str(e.fields.get("context", "")), a.text) if config.extract else a.text for e, a in zip(examples, answers, strict=True)]
    return scores.squad(texts, [list(e.references) for e in examples], language="zh" if config.language == "zh" else "en")


QA = Kind("{context}\n\nQuestion: {question}\nAnswer:", " {answer}", "f1", _judge, most_frequent)
