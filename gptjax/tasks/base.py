"""What a task consists of: examples, answers, and a `Task` that says all that is special.

To add a task, write a file with a `Task` at its end and add a row to TASKS in `tasks/table.py`.
Nothing else names it: training, evaluation and the checks of the config ask the `Task`.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config, TaskConfig
from gptjax.data.records import Record
from gptjax.metrics.bootstrap import Metric
from gptjax.tokenizer.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as ids, with which of them are learned and what an answer is compared with.

    The first `prompt` of the ids are what the model gets when it answers. `learned` says of each
    id whether it is a target; it comes from the same spans as the ids, so that the end of an
    answer is learned even where its id also pads rows.
    """

    where: str  # the row, as file:line
    ids: np.ndarray  # int32 [n]
    learned: np.ndarray  # bool [n]
    prompt: int
    references: tuple[str, ...] = ()  # correct answers as text
    label: float | None = None  # number of the class, or the number itself
    source: str = ""  # text of the prompt's first field
    cut: bool = False  # whether it was too long and lost some of its prompt
    parts: tuple[int, ...] = ()  # lengths of several texts that `ids` holds one after the other
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those of the row


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model or a baseline answers to one example: a text, a class, or a number."""

    text: str = ""
    value: float = 0.0  # number of the class, or the number itself
    probabilities: tuple[float, ...] = ()  # of all classes
    ids: tuple[int, ...] = ()  # what the model wrote


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """How many tokens an example may have.

    length: positions of a row. As the last id of an example is only a target, its ids may be one
    more. policy: `task.truncation`.
    """

    length: int
    policy: str
    lead: int = 0  # lora.prompt_tokens: places before every example
    answer: int = 0  # in evaluation: places for what the model writes; 0 = the reference's length


@dataclasses.dataclass(frozen=True)
class Rendering:
    """What turns rows into examples. config: with the task's own templates where it names none."""

    config: TaskConfig
    tokenizer: Tokenizer
    budget: TokenBudget
    labels: tuple[str, ...] = ()


AnsweredBy = Literal["head", "likelihood", "preference", "writing"]
Baselines = dict[str, list[Answer]]


def no_baselines(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    """Where nothing simple can answer."""
    return {}


def most_frequent(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    """The reference that is most frequent in the training split."""
    counts = collections.Counter(e.references[0] if e.references else "" for e in train)
    text, _ = counts.most_common(1)[0]
    return {"most frequent answer": [Answer(text)] * len(examples)}


def copy_source(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    """The text of the prompt's first field as the answer."""
    return {"copy": [Answer(e.source) for e in examples]}


def no_labels(config: TaskConfig, rows: Sequence[Record]) -> tuple[str, ...]:
    """Of a task that writes text."""
    return ()


def no_faults(config: Config) -> list[str]:
    return []


def needs_checkpoint(config: Config) -> list[str]:
    """The fault of a config that would tune random parameters, where the task needs better ones."""
    if config.train.init_from:
        return []
    fault = (
        f"task.name = {config.task.name!r} tunes a model that can answer: "
        "name its checkpoint in train.init_from"
    )
    return [fault]


def no_reference(config: TaskConfig) -> bool:
    return False


def by_writing(config: TaskConfig) -> AnsweredBy:
    return "writing"


def same_config(config: TaskConfig, has_head: bool) -> TaskConfig:
    return config


def same_examples(config: Config, examples: list[Example]) -> list[Example]:
    return examples


def same_answers(
    config: TaskConfig, examples: Sequence[Example], answers: list[Answer]
) -> list[Answer]:
    return answers


@dataclasses.dataclass(frozen=True)
class Task:
    """All that is special about a task. Only the first three must be given.

    make_example: (rendering, row) to an example; None where it is too long and is to be dropped; a
        list where a row becomes several.
    evaluate: (config, labels, examples, answers) to metrics, of which `headline` is shown first.
    """

    make_example: Callable[[Rendering, Record], Example | list[Example] | None]
    evaluate: Callable[
        [TaskConfig, Sequence[str], Sequence[Example], Sequence[Answer]], dict[str, Metric]
    ]
    headline: str

    # the config
    prompt: str = ""  # template where task.prompt is empty
    completion: str = ""  # template where task.completion is empty
    check: Callable[[Config], list[str]] = no_faults  # faults of several settings together

    # rows to examples
    labels: Callable[[TaskConfig, Sequence[Record]], tuple[str, ...]] = no_labels
    label_dtype: type[np.number] = np.int32  # of targets of a head
    problem: str = "single_label_classification"  # what a head gives: `ModelConfig.problem`
    chat: bool = False  # rows are conversations, always written by the chat template
    texts: Callable[[TaskConfig, Record], list[str]] | None = None
    """What a new tokenizer learns from, where that is not the row's prompt and completion."""
    finish: Callable[[Config, list[Example]], list[Example]] = same_examples
    """Changes the examples of a split when all of them are there."""

    # training
    objective: str = (
        "next_token"  # a row of OBJECTIVES in training/objectives.py; a head has its own
    )
    counts_correct: bool = False  # whether the objective counts correct predictions: an accuracy
    needs_reference: Callable[[TaskConfig], bool] = no_reference
    """Whether the loss needs log-probabilities of the checkpoint that training starts from."""
    samples_rollouts: bool = False
    """Whether batches are what the model itself writes. There is no held-out loss then: answers
    are evaluated along the run, and the best checkpoint has the highest headline metric."""

    # evaluation
    answered_by: Callable[[TaskConfig], AnsweredBy] = by_writing
    postprocess: Callable[[TaskConfig, Sequence[Example], list[Answer]], list[Answer]] = (
        same_answers
    )
    baselines: Callable[[Sequence[Example], Sequence[Example]], Baselines] = no_baselines
    """(examples, training examples) to answers that need no model."""
    adapt: Callable[[TaskConfig, bool], TaskConfig] = same_config
    """The config for a checkpoint, which has a head for classes or has none."""
    package: str = ""  # that `evaluate` needs

    def has_head(self, config: TaskConfig) -> bool:
        """Whether a head on the last token gives a class or a number, instead of text."""
        return self.answered_by(config) == "head"

    def check_package(self) -> None:
        """Raises UserError where evaluating would fail in the end."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"answers are evaluated with the package {self.package}: "
                "pip install 'gptjax[eval]' (or train with task.eval_samples = 0)"
            )

    def with_templates(self, config: TaskConfig) -> TaskConfig:
        """The config with the task's own templates where it names none."""
        return dataclasses.replace(
            config,
            prompt=config.prompt or self.prompt,
            completion=config.completion or self.completion,
        )
