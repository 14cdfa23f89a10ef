"""Free text behind a control prefix: poems, stories, instructions.

The prompt steers; the completion is learned, with its end.
"""

from __future__ import annotations

from gptjax.data.records import Record
from gptjax.tasks import chat
from gptjax.tasks.base import Example, Rendering, Task
from gptjax.tasks.rendering import completion_example, fill_template


def make_example(rendering: Rendering, row: Record) -> Example | None:
    text = fill_template(rendering.config.completion, row, "task.completion")
    return completion_example(rendering, row, references=[text.strip()])


TEXT = Task(
    make_example,
    chat.evaluate,
    headline="chrf",
    completion="{text}",
    package="sacrebleu",
)
