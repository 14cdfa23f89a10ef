"""The tasks: one row each. To add a task, write a file like those below and add a row here.

The choices of the setting `task.name` are read from this table.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.metrics.bootstrap import Metric
from gptjax.tasks.base import Answer, Example, Rendering, Task
from gptjax.tasks.chat import CHAT
from gptjax.tasks.classification import CLASSIFICATION
from gptjax.tasks.grpo import GRPO
from gptjax.tasks.multi_label import MULTI_LABEL
from gptjax.tasks.preference import PREFERENCE
from gptjax.tasks.qa import QA
from gptjax.tasks.regression import REGRESSION
from gptjax.tasks.summarization import SUMMARIZATION
from gptjax.tasks.text import TEXT
from gptjax.tasks.translation import TRANSLATION

TASKS: dict[str, Task] = {
    "classification": CLASSIFICATION,
    "multi_label": MULTI_LABEL,
    "regression": REGRESSION,
    "summarization": SUMMARIZATION,
    "translation": TRANSLATION,
    "qa": QA,
    "chat": CHAT,
    "text": TEXT,
    "preference": PREFERENCE,
    "grpo": GRPO,
}


def _no_examples(rendering: Rendering, row: Record) -> Example | None:
    raise UserError("the config has no task.name, so it has no examples")


def _no_scores(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    return {}


# A run without a task: the next tokens of documents, no examples and no answers.
DOCUMENTS = Task(_no_examples, _no_scores, headline="")


def task_of(config: TaskConfig) -> Task:
    """The task that `task.name` names; `DOCUMENTS` where it names none."""
    return TASKS[config.name] if config.name else DOCUMENTS
