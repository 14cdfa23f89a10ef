"""What preference and policy-gradient tuning need beside data: the reference's log-probabilities, and batches of the model's own answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gptjax import files, lora, losses, model, objectives, preferences, sharding
from gptjax.config import Config, UserError
from gptjax.data import loader
from gptjax.data.sources import TRAIN
from gptjax.language_model import LanguageModel
from gptjax.run import Run
from gptjax.tasks import load
from gptjax.tasks.preference import WITH_REFERENCE
from gptjax.tasks.reward import reward_of

Array = jax.Array
Batch = dict[str, np.ndarray]


def token_logprobs(config: Config, params: Any, batch: dict[str, Array]) -> Array:
    """log p of each target of a batch, float32 [B, T], without dropout."""
    x, _ = model.apply(config.model, params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    rows, length = batch["tokens"].shape
    chunk = losses.chunk_length(config.model, rows, length, config.train.loss_chunk)
    return losses.token_logprobs(config.model, params, x, batch["targets"], chunk=chunk)


def with_reference(run: Run, split: loader.Split, name: str, start: int, params: Any, frozen: Any) -> loader.Split:
    """The split with the log-probability of each answer under the parameters that training starts from: computed before the first step, and read
    from the workdir once they have been trained."""
    c = run.config
    if c.task.name != "preference" or c.task.loss not in WITH_REFERENCE or not split.count:
        return split
    assert isinstance(split, loader.Packed)
    if jax.process_count() > 1:
        raise UserError(f"task.loss = {c.task.loss!r} keeps a reference, which is computed by one process: start one, or use task.loss = 'orpo'")
    place = run.workdir / f"reference-{name}.npy"
    if not start:  # also where a file lies there: it may be of a run that was given up before its first checkpoint
        result = _answer_logprobs(run, split, params, frozen)
        with files.atomic(place) as temporary, open(temporary, "wb") as file:
            np.save(file, result)
        return split.with_reference(result)
    if not place.exists() or len(found := np.load(place)) != sum(len(unit.parts) for unit in split.examples):
        raise UserError(f"{place} is missing or of other examples, and the parameters it came from have been trained since: start in a new --workdir")
    return split.with_reference(found)


def _answer_logprobs(run: Run, split: loader.Packed, params: Any, frozen: Any) -> np.ndarray:
    """float32 [parts of all examples, in order]: log-probability of the learned tokens of each."""
    c, size = run.config, run.config.train.batch_size

    @jax.jit
    def sums(params: Any, frozen: Any, batch: dict[str, Array]) -> Array:
        logp = token_logprobs(c, lora.attach(c.lora, frozen, params), batch)
        return objectives.segment_sums(logp * batch["loss_weights"], batch["segment_ids"])

    batches = loader.eval_batches(split, batch_size=size, rows=range(size))
    rows = itertools.chain.from_iterable(np.asarray(sums(params, frozen, sharding.to_global(run.mesh, batch))) for batch in batches)
    of_example: dict[int, np.ndarray] = {}
    for row, numbers in zip(rows, split.rows, strict=False):  # rows behind the last fill a batch up
        at = 1
        for k in numbers:
            of_example[k] = row[at : at + len(split.examples[k].parts)]
            at += len(of_example[k])
    return np.concatenate([of_example[k] for k in range(len(split.examples))])


class Reads:
    """Batches of the training split, one after the other."""

    def __init__(self, run: Run, split: loader.Split, start: int):
        t = run.config.train
        self._mesh = run.mesh
        self._batches = loader.train_batches(split, seed=t.seed, batch_size=t.batch_size, rows=run.rows, start=start)

    def next(self, step: int, params: Any) -> tuple[dict[str, Array], dict[str, float]]:
        return sharding.to_global(self._mesh, next(self._batches)), {}

    def close(self) -> None:
        self._batches.close()


class Rollouts:
    """Batches of answers that the current parameters write to prompts of the training split, with their rewards as advantages. A function of
    (seed, step, parameters)."""

    def __init__(self, run: Run, frozen: Any):
        assert isinstance(run.data, load.Examples)
        self._run, self._frozen, self._config = run, frozen, run.config
        if jax.process_count() > 1:
            raise UserError("task.name = 'grpo' writes its answers in one process: start one")
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
        count, groups = len(self._examples), self._config.train.batch_size // self._config.task.samples
        for at in range(step * groups, (step + 1) * groups):
            random = np.random.Generator(np.random.Philox(key=(self._config.train.seed, at // count)))
            yield int(random.permutation(count)[at % count])

    def next(self, step: int, params: Any) -> tuple[dict[str, Array], dict[str, float]]:
        c, task = self._config, self._config.task
        chosen = [self._examples[i] for i in self._prompts(step)]
        lm = LanguageModel(c.model, lora.attach(c.lora, self._frozen, params), self._run.tokenizer)
        seed = int(np.random.Generator(np.random.Philox(key=(c.train.seed, step))).integers(1 << 31))
        prompts = [e.ids[: e.prompt].tolist() for e in chosen]
        found = lm.generate(prompts, max_new_tokens=task.max_new_tokens, n=task.samples, temperature=1.0, seed=seed)
        asked = [e for e in chosen for _ in range(task.samples)]
        rewards = np.array([self._reward(one.text, e.references) for e, one in zip(asked, found, strict=True)], np.float32)
        gains = np.asarray(preferences.advantages(rewards.reshape(-1, task.samples))).reshape(-1)
        rows = []
        for e, one, gain in zip(asked, found, gains, strict=True):
            answer = one.tokens if one.end is None else [*one.tokens, one.end]
            ids = np.array([*e.ids[: e.prompt].tolist(), *answer], np.int32)
            row, n = loader.nothing(c.length), len(ids) - 1
            row["tokens"][:n], row["targets"][:n] = ids[:-1], ids[1:]
            row["loss_weights"][e.prompt - 1 : n] = 1
            rows.append({**row, "advantages": np.full(c.length, gain, np.float32)})
        batch = sharding.to_global(self._run.mesh, loader.stack(rows))
        if task.kl:
            batch["reference"] = self._logprobs(lora.attach(c.lora, self._frozen, {}), batch)
        lengths = float(np.mean([len(one.tokens) for one in found]))
        return batch, {"reward": float(rewards.mean()), "answer_tokens": lengths}

    def close(self) -> None:
        self._examples = []


def feed(run: Run, start: int, params: Any, frozen: Any) -> Reads | Rollouts:
    """Where the batches of the run come from. params: those that training starts from (a reference needs them)."""
    if run.config.task.name == "grpo":
        return Rollouts(run, frozen)
    return Reads(run, with_reference(run, run.split(TRAIN), TRAIN, start, params, frozen), start)
