"""Prompts whose answers a function can check: tuned by policy gradient (GRPO) on what the model itself writes.

A reward is a function (answer, references) -> number. To add one, add it to `REWARDS`, or name your own in task.reward as path/to/file.py:function.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric, mean_metric
from gptjax.tasks.base import (
    Answer,
    Example,
    Task,
    TokenBudget,
    completion,
    fill_template,
    no_baseline,
)
from gptjax.tokenizer.base import Tokenizer

Reward = Callable[[str, Sequence[str]], float]


REWARDS: dict[str, Reward] = {
    "exact": lambda answer, references: float(answer.strip() in [r.strip() for r in references]),
    "contains": lambda answer, references: float(any(r.strip() in answer for r in references)),
    "f1": lambda answer, references: text_metrics.squad([answer], [list(references)])["f1"].value,
}


def reward_of(config: TaskConfig) -> Reward:
    """The function that task.reward names. Raises UserError."""
    if config.reward in REWARDS:
        return REWARDS[config.reward]
    path, _, name = config.reward.rpartition(":")
    if not path:
        raise UserError(
            f"task.reward: {unknown_name('reward', config.reward, list(REWARDS))}, or name your own as path/to/file.py:function"
        )
    spec = importlib.util.spec_from_file_location("gptjax_reward", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise UserError(f"task.reward = {config.reward!r}: no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"task.reward = {config.reward!r}: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not callable(found := getattr(module, name, None)):
        raise UserError(f"task.reward = {config.reward!r}: {path} defines no function {name!r}")
    return _checked(found, config.reward)


def _checked(reward: Reward, name: str) -> Reward:
    def call(answer: str, references: Sequence[str]) -> float:
        try:
            value = float(reward(answer, references))
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"task.reward = {name!r} failed on the answer {answer[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise UserError(
                f"task.reward = {name!r} gave {value} for the answer {answer[:80]!r}: rewards must be finite numbers"
            )
        return value

    return call


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    reference = fill_template(config.completion or REWARD.completion, row, "task.completion")
    return completion(config, REWARD, tokenizer, row, room, references=[reference])


def _judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    reward = reward_of(config)
    return {
        "reward": mean_metric(
            np.array([reward(a.text, e.references) for e, a in zip(examples, answers, strict=True)])
        )
    }


REWARD = Task("{prompt}", "{answer}", "reward", _judge, no_baseline)
