"""What preference and policy-gradient tuning need beside data: the reference's log-probabilities, and batches of the model's own answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Batch
from gptjax.data import loader
from gptjax.data.sources import TRAIN
from gptjax.generation.language_model import LanguageModel
from gptjax.model import lora
from gptjax.runtime import sharding
from gptjax.tasks import loading
from gptjax.tasks.grpo import reward_of
from gptjax.tasks.table import task_of
from gptjax.training import preference_losses
from gptjax.training.batches import Reads, token_logprobs, with_reference
from gptjax.training.setup import Run


class Rollouts:
    """Batches of answers that the current parameters write to prompts of the training split, with their rewards as advantages. A function of
    (seed, step, parameters)."""

    def __init__(self, run: Run, frozen: Any):
        assert isinstance(run.data, loading.Examples)
        self._run, self._frozen, self._config = run, frozen, run.config
        if jax.process_count() > 1:
            raise UserError(
                f"task.name = {run.config.task.name!r} writes its answers in one process: start one"
            )
        self._examples, self._reward = run.data.train, reward_of(run.config.task)
        longest = max(e.prompt for e in self._examples)
        if longest + run.config.task.max_new_tokens > run.config.length:
            raise UserError(
                f"the longest prompt has {longest} tokens and task.max_new_tokens = {run.config.task.max_new_tokens}, but a row holds {run.config.length}:\n"
                "raise data.length or model.context, or ask for shorter answers"
            )
        self._logprobs = jax.jit(lambda frozen, batch: token_logprobs(run.config, frozen, batch))

    def _prompts(self, step: int) -> Iterator[int]:
        """Numbers of the step's prompts: each example once an epoch, in an order drawn anew."""
        count, groups = (
            len(self._examples),
            self._config.train.batch_size // self._config.task.num_generations,
        )
        for at in range(step * groups, (step + 1) * groups):
            random = np.random.Generator(
                np.random.Philox(key=(self._config.train.seed, at // count))
            )
            yield int(random.permutation(count)[at % count])

    def next(self, step: int, params: Any) -> tuple[Batch, dict[str, float]]:
        c, task = self._config, self._config.task
        chosen = [self._examples[i] for i in self._prompts(step)]
        lm = LanguageModel(
            c.model, lora.apply_adapter(c.lora, self._frozen, params), self._run.tokenizer
        )
        seed = int(
            np.random.Generator(np.random.Philox(key=(c.train.seed, step))).integers(1 << 31)
        )
        prompts = [e.ids[: e.prompt].tolist() for e in chosen]
        found = lm.generate(
            prompts,
            max_new_tokens=task.max_new_tokens,
            n=task.num_generations,
            temperature=1.0,
            seed=seed,
        )
        asked = [e for e in chosen for _ in range(task.num_generations)]
        rewards = np.array(
            [self._reward(one.text, e.references) for e, one in zip(asked, found, strict=True)],
            np.float32,
        )
        gains = np.asarray(
            preference_losses.advantages(rewards.reshape(-1, task.num_generations))
        ).reshape(-1)
        rows = []
        for e, one, gain in zip(asked, found, gains, strict=True):
            answer = one.tokens if one.end is None else [*one.tokens, one.end]
            ids = np.array([*e.ids[: e.prompt].tolist(), *answer], np.int32)
            row, n = loader.empty_row(c.length), len(ids) - 1
            row.tokens[:n], row.targets[:n] = ids[:-1], ids[1:]
            row.loss_weights[e.prompt - 1 : n] = 1
            rows.append(dataclasses.replace(row, advantages=np.full(c.length, gain, np.float32)))
        batch = sharding.to_global(self._run.mesh, loader.stack(rows))
        if task.kl_coef:
            reference = self._logprobs(lora.apply_adapter(c.lora, self._frozen, {}), batch)
            batch = dataclasses.replace(batch, reference=reference)
        lengths = float(np.mean([len(one.tokens) for one in found]))
        return batch, {"reward": float(rewards.mean()), "answer_tokens": lengths}

    def close(self) -> None:
        self._examples = []


def feed(run: Run, start: int, params: Any, frozen: Any) -> Reads | Rollouts:
    """Where the batches of the run come from. params: those that training starts from (a reference needs them)."""
    if task_of(run.config.task).samples_rollouts:
        return Rollouts(run, frozen)
    return Reads(run, with_reference(run, run.split(TRAIN), TRAIN, start, params, frozen), start)
