"""Free text behind a control prefix: poems, stories, instructions. The prompt steers, the completion is learned, its end too."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.config import TaskConfig
from gptjax.data.rows import Row
from gptjax.tasks import dialogue
from gptjax.tasks.base import Example, Kind, Room, completion, fill, no_baseline
from gptjax.tokenizer import Tokenizer


def example(config: TaskConfig, tokenizer: Tokenizer, row: Row, room: Room, labels: Sequence[str]) -> Example | None:
    reference = fill(config.completion or TEXT.completion, row, "task.completion").strip()
    return completion(config, TEXT, tokenizer, row, room, references=[reference])


TEXT = Kind("", "{text}", "chrf", dialogue.judge, no_baseline, "sacrebleu")
