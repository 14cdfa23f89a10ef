"""TODO docstring."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import files
from gptjax.core.types import Array, Batch
from gptjax.data import loader
from gptjax.data.packing import Packed
from gptjax.model import lora, transformer
from gptjax.ops import cross_entropy
from gptjax.runtime import sharding
from gptjax.tasks.table import task_of
from gptjax.training import objectives
from gptjax.training.setup import Run


def token_logprobs(config: Config, params: Any, batch: Batch) -> Array:
    """log p of each target of a batch, float32 [B, T], without dropout."""
    x, _ = transformer.apply(
        config.model,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
    rows, length = batch.tokens.shape
    chunk = cross_entropy.chunk_length(config.model, rows, length, config.train.loss_chunk)
    return cross_entropy.token_logprobs(config.model, params, x, batch.targets, chunk=chunk)


def with_reference(
    run: Run, split: loader.Split, name: str, start: int, params: Any, frozen: Any
) -> loader.Split:
    """The split with the log-probability of each answer under the parameters that training starts from: computed before the first step, and read
    from the workdir once they have been trained."""
    c = run.config
    if not task_of(c.task).needs_reference(c.task) or not split.count:
        return split
    assert isinstance(split, Packed)
    if jax.process_count() > 1:
        raise UserError(
            f"task.loss = {c.task.loss!r} keeps a reference, which is computed by one process: start one, or use task.loss = 'orpo'"
        )
    place = run.workdir / f"reference-{name}.npy"
    if not start:  # also where a file lies there: it may be of a run that was given up before its first checkpoint
        result = _answer_logprobs(run, split, params, frozen)
        with files.atomic(place) as temporary, open(temporary, "wb") as file:
            np.save(file, result)
        return split.with_reference(result)
    if not place.exists() or len(found := np.load(place)) != sum(
        len(unit.parts) for unit in split.examples
    ):
        raise UserError(
            f"{place} is missing or of other examples, and the parameters it came from have been trained since: start in a new --workdir"
        )
    return split.with_reference(found)


def _answer_logprobs(run: Run, split: Packed, params: Any, frozen: Any) -> np.ndarray:
    """float32 [parts of all examples, in order]: log-probability of the learned tokens of each."""
    c, size = run.config, run.config.train.batch_size

    @jax.jit
    def sums(params: Any, frozen: Any, batch: Batch) -> Array:
        logp = token_logprobs(c, lora.apply_adapter(c.lora, frozen, params), batch)
        return objectives.segment_sums(logp * batch.loss_weights, batch.segment_ids)

    batches = loader.eval_batches(split, batch_size=size, rows=range(size))
    rows = itertools.chain.from_iterable(
        np.asarray(sums(params, frozen, sharding.to_global(run.mesh, batch))) for batch in batches
    )
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
        self._batches = loader.train_batches(
            split, seed=t.seed, batch_size=t.batch_size, rows=run.rows, start=start
        )

    def next(self, step: int, params: Any) -> tuple[Batch, dict[str, float]]:
        return sharding.to_global(self._mesh, next(self._batches)), {}

    def close(self) -> None:
        self._batches.close()
