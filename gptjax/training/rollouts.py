"""Batches of answers that the model in training writes itself, scored by a reward (GRPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Batch, Params
from gptjax.data import loader
from gptjax.data.sources import TRAIN
from gptjax.generation.language_model import LanguageModel
from gptjax.model import lora
from gptjax.runtime import sharding
from gptjax.tasks import loading
from gptjax.tasks.base import Example
from gptjax.tasks.grpo import reward_of
from gptjax.tasks.table import task_of
from gptjax.training import preference_losses
from gptjax.training import step as train_step
from gptjax.training.batches import SplitBatches, with_reference
from gptjax.training.setup import Run


class Rollouts:
    """Answers of the current parameters to prompts of the training split, with their advantages.

    Each batch is a function of (seed, step, parameters).
    """

    def __init__(self, run: Run, frozen: Params) -> None:
        """Raises UserError for several processes, or where prompts and answers exceed a row."""
        assert isinstance(run.data, loading.Examples)
        if jax.process_count() > 1:
            raise UserError(
                f"task.name = {run.config.task.name!r} writes its answers in one process: start one"
            )
        config = run.config
        self._run, self._frozen, self._config = run, frozen, config
        self._examples, self._reward = run.data.train, reward_of(config.task)
        longest = max(example.prompt for example in self._examples)
        if longest + config.task.max_new_tokens > config.length:
            raise UserError(
                f"the longest prompt has {longest} tokens and task.max_new_tokens = "
                f"{config.task.max_new_tokens}, but a row holds {config.length}:\n"
                "raise data.length or model.context, or ask for shorter answers"
            )

        self._logprobs = train_step.make_logprobs_step(run.plan)

    def _prompts(self, step: int) -> Iterator[int]:
        """Numbers of the step's prompts: each example once an epoch, in an order drawn anew."""
        config, count = self._config, len(self._examples)
        groups = config.train.batch_size // config.task.num_generations
        for position in range(step * groups, (step + 1) * groups):
            epoch, at = divmod(position, count)
            random = np.random.Generator(np.random.Philox(key=(config.train.seed, epoch)))
            yield int(random.permutation(count)[at])

    def next(self, step: int, params: Params) -> tuple[Batch, dict[str, float]]:
        """The batch of a step, and its mean reward and answer length, recorded with the step."""
        config, task = self._config, self._config.task
        chosen = [self._examples[number] for number in self._prompts(step)]
        lm = LanguageModel(
            config.model,
            lora.apply_adapter(config.lora, self._frozen, params),
            self._run.tokenizer,
            mesh=self._run.mesh,
        )
        random = np.random.Generator(np.random.Philox(key=(config.train.seed, step)))
        completions = lm.generate(
            [example.ids[: example.prompt].tolist() for example in chosen],
            max_new_tokens=task.max_new_tokens,
            n=task.num_generations,
            regex=task.regex or None,
            temperature=1.0,
            seed=int(random.integers(1 << 31)),
        )
        prompts = [example for example in chosen for _ in range(task.num_generations)]
        rewards = np.array(
            [
                self._reward(completion.text, example.references)
                for example, completion in zip(prompts, completions, strict=True)
            ],
            np.float32,
        )
        groups = rewards.reshape(-1, task.num_generations)
        advantages = np.asarray(preference_losses.advantages(groups)).reshape(-1)
        rows = []
        for example, completion, advantage in zip(prompts, completions, advantages, strict=True):
            eos = [] if completion.end is None else [completion.end]
            row = answer_row(config.length, example, [*completion.tokens, *eos])
            column = np.full(config.length, advantage, np.float32)
            rows.append(dataclasses.replace(row, advantages=column))
        batch = sharding.to_global(self._run.mesh, loader.stack(rows))
        if task.kl_coef:
            batch = dataclasses.replace(batch, reference=self._logprobs({}, batch, self._frozen))
        lengths = [len(completion.tokens) for completion in completions]
        recorded = {"reward": float(rewards.mean()), "answer_tokens": float(np.mean(lengths))}
        return batch, recorded

    def close(self) -> None:
        self._examples = []


def answer_row(length: int, example: Example, answer: Sequence[int]) -> Batch:
    """Arrays [length] of a prompt and an answer to it; only the answer is learned."""
    ids = np.array([*example.ids[: example.prompt].tolist(), *answer], np.int32)
    row, count = loader.empty_row(length), len(ids) - 1
    row.tokens[:count], row.targets[:count] = ids[:-1], ids[1:]
    row.loss_weights[example.prompt - 1 : count] = 1
    return row


def make_batches(run: Run, start: int, params: Params, frozen: Params) -> SplitBatches | Rollouts:
    """Where the batches of the run come from, from step `start`.

    params: those that training starts from, which a reference is computed with.
    """
    if task_of(run.config.task).samples_rollouts:
        return Rollouts(run, frozen)
    split = with_reference(run, run.split(TRAIN), TRAIN, start, params, frozen)
    return SplitBatches(run, split, start)
