"""Batches of the training split, and the reference that preference losses need.

In: a run and a split of its data. Out: arrays over all devices of the mesh, `[B, T]` each. Batches
that the model writes itself are in `rollouts.py`.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.core.types import Array, Batch, Params
from gptjax.data import loader
from gptjax.data.packing import Packed
from gptjax.runtime import sharding
from gptjax.tasks.table import task_of
from gptjax.training import objectives
from gptjax.training import step as train_step
from gptjax.training.setup import Run


class SplitBatches:
    """Batches of the training split, one after the other, from step `start`."""

    def __init__(self, run: Run, split: loader.Split, start: int) -> None:
        train = run.config.train
        self._mesh = run.mesh
        self._batches = loader.train_batches(
            split, seed=train.seed, batch_size=train.batch_size, rows=run.rows, start=start
        )

    def next(self, step: int, params: Params) -> tuple[Batch, dict[str, float]]:
        """The next batch, and what is recorded with the step's own metrics: nothing."""
        return sharding.to_global(self._mesh, next(self._batches)), {}

    def close(self) -> None:
        self._batches.close()


def with_reference(
    run: Run, split: loader.Split, name: str, start: int, params: Params, frozen: Params
) -> loader.Split:
    """The split with the log-probability of each answer before training, where the loss needs it.

    Computed before the first step (`start` = 0) and written to the workdir; read from there once
    the parameters have been trained. name: of the split. Raises UserError.
    """
    task = run.config.task
    if not task_of(task).needs_reference(task) or not split.count:
        return split
    assert isinstance(split, Packed)
    if jax.process_count() > 1:
        raise UserError(
            f"task.loss = {task.loss!r} keeps a reference, which is computed by one "
            "process: start one, or use task.loss = 'orpo'"
        )
    path = run.workdir / f"reference-{name}.npy"
    if not start:
        # A file that is there may be of a run that was given up before its first checkpoint.
        logprobs = _answer_logprobs(run, split, params, frozen)
        files.write_array(path, logprobs)
        return split.with_reference(logprobs)
    answers = sum(len(example.parts) for example in split.examples)
    stored = np.load(path) if path.exists() else None
    if stored is None or len(stored) != answers:
        raise UserError(
            f"{path} is missing or of other examples, and the parameters it came from have been "
            "trained since: start in a new --workdir"
        )
    return split.with_reference(stored)


def _answer_logprobs(run: Run, split: Packed, params: Params, frozen: Params) -> np.ndarray:
    """float32 [answers of all examples, in order]: log-probability of each one's learned tokens."""
    size, logprobs = run.config.train.batch_size, train_step.make_logprobs_step(run.plan)

    @jax.jit
    def sums_by_segment(params: Params, frozen: Params, batch: Batch) -> Array:
        logp_BT = logprobs(params, batch, frozen)
        return objectives.segment_sums(logp_BT * batch.loss_weights, batch.segment_ids)

    batches = loader.eval_batches(split, batch_size=size, rows=range(size))
    rows = itertools.chain.from_iterable(
        np.asarray(sums_by_segment(params, frozen, sharding.to_global(run.mesh, batch)))
        for batch in batches
    )
    of_example: dict[int, np.ndarray] = {}
    # Rows after the split's last one fill the last batch up.
    for row, numbers in zip(rows, split.rows, strict=False):
        start = 1  # segment 0 is padding
        for number in numbers:
            stop = start + len(split.examples[number].parts)
            of_example[number] = row[start:stop]
            start = stop
    return np.concatenate([of_example[number] for number in range(len(split.examples))])
