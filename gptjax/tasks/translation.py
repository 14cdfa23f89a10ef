"""Sentences to another language; BLEU and chrF, and the source itself as the answer to beat."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax import scores
from gptjax.config import TaskConfig
from gptjax.data.rows import Row
from gptjax.scores import Metric
from gptjax.tasks.base import Answer, Example, Kind, Room, completion, copied, names_in
from gptjax.tokenizer import Tokenizer


def example(config: TaskConfig, tokenizer: Tokenizer, row: Row, room: Room, labels: Sequence[str]) -> Example | None:
    names = names_in(config.completion or TRANSLATION.completion, "task.completion")
    return completion(config, TRANSLATION, tokenizer, row, room, references=[row.text(name, knob="task.completion") for name in names[:1]])


def judge(config: TaskConfig, labels: Sequence[str], examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Metric]:
    words = "zh" if config.language == "zh" else "13a"
    return scores.translation([a.text for a in answers], [list(e.references) for e in examples], tokenize=words)


TRANSLATION = Kind("{source} =", " {target}", "chrf", judge, copied, "sacrebleu")
