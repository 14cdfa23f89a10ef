"""Free text behind a control prefix: poems, stories, instructions. The prompt steers, the completion is learned, its end too."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.config import TaskConfig
from gptjax.data.rows import Row
from gptjax.scores import Metric
from gptjax.tasks import dialogue
from gptjax.tasks.base import Answer, Example, Kind, Room, completion, fill
from gptjax.tokenizer import Tokenizer


def example(config: TaskConfig, tokenizer: Tokenizer, row: Row, room: Room, labels: Sequence[str]) -> Example | None:
    reference = fill(config.completion or TEXT.completion, row, "task.completion").strip()
    return completion(config, TEXT, tokenizer, row, room, references=[reference])


def _judge(config: TaskConfig, labels: Sequence[str], examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Metric]:
    return dialogue.judge(config, labels, examples, answers)


def _none(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    return {}


TEXT = Kind("", "{text}", "chrf", _judge, _none)
