"""Prompts whose answers a function can check, tuned by policy gradient (GRPO).

The model learns from what it writes itself. A reward is a function (answer, references) -> number.
To add one, add a row to REWARDS, or name your own in task.reward as path/to/file.py:function.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config, TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric, mean_metric
from gptjax.tasks.base import Answer, Example, Rendering, Task, needs_checkpoint
from gptjax.tasks.rendering import completion_example, fill_template

Reward = Callable[[str, Sequence[str]], float]


def _exact(answer: str, references: Sequence[str]) -> float:
    return float(answer.strip() in [reference.strip() for reference in references])


def _contains(answer: str, references: Sequence[str]) -> float:
    return float(any(reference.strip() in answer for reference in references))


def _f1(answer: str, references: Sequence[str]) -> float:
    return text_metrics.squad([answer], [list(references)])["f1"].value


REWARDS: dict[str, Reward] = {"exact": _exact, "contains": _contains, "f1": _f1}


def check(config: Config) -> list[str]:
    task, batch_size = config.task, config.train.batch_size
    faults = needs_checkpoint(config)
    if task.kl_coef and not config.lora.on:
        faults.append(
            f"task.kl_coef = {task.kl_coef} keeps near the frozen base of adapters: "
            "set lora.rank, or task.kl_coef = 0"
        )
    if batch_size % task.num_generations:
        faults.append(
            f"task.num_generations = {task.num_generations} does not divide "
            f"train.batch_size = {batch_size}, which counts answers: pick a divisor"
        )
    return faults


def reward_of(config: TaskConfig) -> Reward:
    """The function that task.reward names. Raises UserError."""
    if config.reward in REWARDS:
        return REWARDS[config.reward]
    path, _, name = config.reward.rpartition(":")
    setting = f"task.reward = {config.reward!r}"
    if not path:
        raise UserError(
            f"task.reward: {unknown_name('reward', config.reward, list(REWARDS))}, "
            "or name your own as path/to/file.py:function"
        )
    spec = importlib.util.spec_from_file_location("gptjax_reward", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise UserError(f"{setting}: no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"{setting}: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{setting}: {path} defines no function {name!r}")
    return _checked_reward(function, setting)


def _checked_reward(reward: Reward, setting: str) -> Reward:
    """The user's function, whose faults are UserErrors that show the answer."""

    def call(answer: str, references: Sequence[str]) -> float:
        try:
            value = float(reward(answer, references))
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"{setting} failed on the answer {answer[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise UserError(
                f"{setting} gave {value} for the answer {answer[:80]!r}: "
                "rewards must be finite numbers"
            )
        return value

    return call


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """A prompt; the completion is not learned, it is the reference that a reward compares with."""
    reference = fill_template(rendering.config.completion, row, "task.completion")
    return completion_example(rendering, row, references=[reference])


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """The mean reward."""
    reward = reward_of(config)
    rewards = [
        reward(answer.text, example.references)
        for example, answer in zip(examples, answers, strict=True)
    ]
    return {"reward": mean_metric(np.array(rewards))}


GRPO = Task(
    make_example,
    evaluate,
    headline="reward",
    prompt="{prompt}",
    completion="{answer}",
    check=check,
    objective="grpo",
    samples_rollouts=True,
)
