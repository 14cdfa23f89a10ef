"""Free text behind a control prefix: poems, stories, instructions. The prompt steers, the completion is learned, its end too."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.tasks import chat
from gptjax.tasks.base import Example, Task, TokenBudget, completion, fill_template, no_baseline
from gptjax.tokenizer.base import Tokenizer


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    reference = fill_template(config.completion or TEXT.completion, row, "task.completion").strip()
    return completion(config, TEXT, tokenizer, row, room, references=[reference])


TEXT = Task("", "{text}", "chrf", chat.judge, no_baseline, "sacrebleu")
