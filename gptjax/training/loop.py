"""The loop of a run: pretraining and fine-tuning alike.

`train` starts a new run or resumes one from its newest intact checkpoint, steps until the last
step or a signal, and returns the summary that the command prints. What happens after a step, and
in which order, is `Loop.run_until`. An evaluation or a sample that a step was due for and that was
not finished, because the run was stopped or killed, is owed: a resumed run begins with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.config import checks, schema
from gptjax.config.errors import UserError
from gptjax.core import cli, files, tree
from gptjax.core.types import Params, TrainState
from gptjax.data import loader, shards
from gptjax.data.records import subsample_evenly
from gptjax.data.sources import EVAL
from gptjax.evaluation import answers
from gptjax.evaluation.held_out import held_out_scores, summary_line
from gptjax.generation.language_model import LanguageModel
from gptjax.model import lora
from gptjax.runtime import distributed
from gptjax.runtime.devices import memory, peak_flops
from gptjax.runtime.interrupt import Interrupted
from gptjax.tasks import loading
from gptjax.tasks.table import task_of
from gptjax.tracking import jsonl, progress
from gptjax.tracking.base import TrackedRun
from gptjax.tracking.progress import Progress
from gptjax.tracking.throughput import StepMetrics
from gptjax.tracking.trackers import Trackers
from gptjax.training import batches, report, rollouts
from gptjax.training import step as train_step
from gptjax.training.checkpointing import RunCheckpoints
from gptjax.training.setup import Run


def train(run: Run) -> dict[str, Any]:
    """From a new state or the newest checkpoint to the last step. Returns the summary.

    Raises UserError where the numbers stop being finite or the last checkpoint cannot be written.
    """
    settings = run.config.train
    checkpoints = RunCheckpoints(run.workdir, run.meta, max_to_keep=settings.max_to_keep)
    state, frozen = start_or_resume(run, checkpoints)
    start, last = int(state.step), min(settings.steps, settings.stop_at or settings.steps)
    if start >= last and not any(owed(run, start, last)):
        checkpoints.close()
        return finish(run, start, status="finished" if start >= settings.steps else "stopped")
    loop = Loop(run, state, frozen, checkpoints)
    try:
        status = loop.run_until(last)
    except UserError:
        if jax.process_index() == 0:
            report.mark(run.workdir, status="failed")
        raise
    finally:
        loop.close()
    if status == "failed to save":
        raise UserError(
            f"the checkpoint of step {loop.step} could not be written to {run.workdir} (see "
            "above for the reason): remove the cause and run the same command again"
        )
    records = loop.tracker.latest if loop.tracker else ()
    return finish(run, loop.step, status=status, records=records)


def start_or_resume(run: Run, checkpoints: RunCheckpoints) -> train_step.StateAndFrozen:
    """The state of the newest checkpoint, or a new one; says which, and how large it is.

    Lets go of the checkpoint that the run started from, whose memory is needed no more.
    """
    plan = run.plan
    restored = checkpoints.restore(plan.state_shapes, plan.state_shardings)
    params = run.source.params if run.source else None
    run.source = None
    if restored:
        started = train_step.StateAndFrozen(restored, train_step.place_frozen(plan, params))
        cli.say(f"continue after step {int(restored.step)}")
    else:
        started = train_step.init_state(plan, params)
        init_from = run.config.train.init_from
        origin = f", parameters from {init_from}" if init_from else ""
        cli.say(f"new run in {run.workdir}{origin}")
    state, frozen = started
    on_frozen = f" on {tree.size(frozen):,} frozen ones" if frozen else ""
    device = jax.local_devices()[0]
    mebibytes = tree.nbytes(state) / 2**20
    on_device = tree.bytes_on_device(state, device) / 2**20
    cli.say(
        f"{tree.size(state.params):,} parameters{on_frozen}; state {mebibytes:,.1f} MiB, "
        f"{on_device:,.1f} MiB of it on {device}"
    )
    return started


class Profiler:
    """Traces the steps `train.profile_steps` into profile/ of the workdir."""

    def __init__(self, run: Run) -> None:
        self._folder = run.workdir / "profile"
        self._range = checks.profile_range(run.config)
        self._tracing = False

    def before_step(self, step: int) -> None:
        if self._range and step == self._range[0]:
            with cli.reporting(f"{self._folder}"):
                jax.profiler.start_trace(str(self._folder))
                self._tracing = True

    def after_step(self, step: int, state: TrainState, *, ends: bool) -> None:
        """ends: no step follows in this process."""
        if self._tracing and self._range and (ends or step == self._range[1]):
            jax.block_until_ready(state)
            self._tracing = False
            with cli.reporting(f"{self._folder}"):
                jax.profiler.stop_trace()


class Loop:
    """The steps of a run: the state and the step's number, and where batches and records go."""

    def __init__(
        self, run: Run, state: TrainState, frozen: Params, checkpoints: RunCheckpoints
    ) -> None:
        train = run.config.train
        self.run, self.state, self.frozen, self.checkpoints = run, state, frozen, checkpoints
        self.step = int(state.step)  # steps done
        self.batches = rollouts.make_batches(run, self.step, state.params, frozen)
        began = time.monotonic()
        # Compiled ahead of time, from shapes: no second compilation can happen.
        self.train_step = train_step.lower(run.plan).compile()
        self.eval_step = train_step.make_eval_step(run.plan)
        self.compile_seconds = time.monotonic() - began
        cli.say(
            f"compiled the step in {self.compile_seconds:.1f} s ({run.compiles.hits} programs from "
            f"the cache, {run.compiles.misses} new)"
        )
        self.metrics = StepMetrics(train.batch_size * run.config.length)
        self.peak_flops = peak_flops(run.mesh.devices.flat[0])
        self.tracker = None
        if jax.process_index() == 0:
            config = schema.to_dict(run.config)
            tracked = TrackedRun(run.workdir, start=self.step, config=config)
            self.tracker = Trackers(train.trackers, tracked)
        self.progress = Progress(start=self.step, steps=train.steps)

    def run_until(self, last: int) -> str:
        """Steps until `last` or until stopped. Returns the run's status."""
        train, stop = self.run.config.train, self.run.stop
        self.held_out = batches.with_reference(
            self.run, self.run.split(EVAL), EVAL, self.step, self.state.params, self.frozen
        )
        profiler = Profiler(self.run)
        stop.grace = True
        try:
            self.do(owed(self.run, self.step, last), at_end=self.step >= last)
            if self.step < last:
                self.fetch_batch()
            self.progress.begin()
            self.metrics.restart_clock()
            self.waited = 0.0  # the first batch was fetched before the clock started
            while self.step < last:
                profiler.before_step(self.step + 1)
                self.train_one_step()
                at_end = self.step == last
                stopping = stop.now()
                profiler.after_step(self.step, self.state, ends=stopping or at_end)
                log = at_end or is_due(self.step, train.log_every)
                save = at_end or is_due(self.step, train.save_every)
                due = due_at(self.run, self.step, last)
                if log or save or any(due) or stopping:
                    self.log()
                # Saved before anything that takes long or may fail.
                saving = save or stopping
                if saving and not self.checkpoints.save(self.state, wait=stopping or at_end):
                    return "failed to save"
                if stopping:
                    return "interrupted"
                self.do(due, at_end=at_end)
                if not at_end:
                    self.fetch_batch()
                if any(due):
                    self.metrics.restart_clock()
        except Interrupted:  # in what changes no state, so this is the state after a step
            saved = self.checkpoints.save(self.state, wait=True)
            return "interrupted" if saved else "failed to save"
        return "finished" if self.step == train.steps else "stopped"

    def do(self, due: Due, *, at_end: bool) -> None:
        """What is due after a step. Raises Interrupted where the run is to stop."""
        if due.evaluate and self.held_out.count:
            self.evaluate(self.held_out, at_end=at_end)
        if due.sample:
            self.sample()

    def fetch_batch(self) -> None:
        """The next batch, and what is recorded with its step: the seconds it took, a reward."""
        began = time.monotonic()
        with self.run.stop.interruptible():
            self.batch, self.recorded = self.batches.next(self.step, self.state.params)
        self.waited = time.monotonic() - began

    def train_one_step(self) -> None:
        self.state, step_metrics = self.train_step(self.state, self.batch, self.frozen)
        self.step += 1
        self.metrics.add(step_metrics | self.recorded, self.waited)

    def log(self) -> None:
        """Means since the last record, to the terminal and the trackers."""
        run, config = self.run, self.run.config
        values = self.metrics.flush(self.step)
        if not values:
            return
        values["train/tokens"] = float(self.step) * config.train.batch_size * config.length
        values |= memory()
        values["perf/compile_seconds"] = self.compile_seconds
        values["perf/compiles"] = float(run.compiles.count)
        if self.peak_flops:
            achieved = values["perf/tokens_per_sec"] * run.plan.flops_per_token
            values["perf/mfu"] = achieved / (self.peak_flops * run.mesh.devices.size)
        self.progress.show(self.step, values)
        if self.tracker:
            self.tracker.log(self.step, values)

    def evaluate(self, held_out: loader.Split, *, at_end: bool) -> None:
        """Scores of the held-out split and of a task's answers; saves the best state."""
        run, config, params = self.run, self.run.config, self.state.params
        task = task_of(config.task)
        values = {}
        with run.stop.interruptible():
            if not task.samples_rollouts:  # whose objective needs answers
                values = held_out_scores(
                    config,
                    run.mesh,
                    held_out,
                    run.tokenizer,
                    self.eval_step,
                    params,
                    self.frozen,
                    before_batch=run.stop.poll,
                )
            if answers_due(run, at_end=at_end):
                values |= evaluate_task(run, self.step, self.all_params())
        if not values:
            self.progress.note(self.step, "the held-out split has no target, so no evaluation")
            return
        # The record comes last: what has one is not owed.
        if config.train.keep_best:
            headline = values.get(f"answers/{task.headline}", 0.0)
            self.checkpoints.save_best(self.state, values.get("eval/loss", -headline))
        self.progress.note(self.step, summary_line(values))
        if self.tracker:
            self.tracker.log(self.step, values)

    def sample(self) -> None:
        """Text of a language model; tasks show answers instead (`evaluate`)."""
        with self.run.stop.interruptible():
            text = sample_text(self.run, self.all_params())
        self.progress.note(self.step, text)
        write_sample(self.run, self.step, text)

    def all_params(self) -> Params:
        """The parameters of the model: adapters are applied to the frozen ones."""
        return lora.apply_adapter(self.run.config.lora, self.frozen, self.state.params)

    def close(self) -> None:
        self.progress.close()
        self.batches.close()
        self.checkpoints.close()
        if self.tracker:
            self.tracker.close(lambda: self.run.stop.requested)


class Due(NamedTuple):
    """What follows a step."""

    evaluate: bool
    sample: bool


def is_due(step: int, every: int) -> bool:
    """every: 0 is never."""
    return bool(every) and step % every == 0


def due_at(run: Run, step: int, last: int) -> Due:
    """What the settings ask for after `step`, and after the last one in any case."""
    train = run.config.train
    # of a language model; tasks show answers instead (`evaluate_task`)
    samples = train.sample_tokens and not run.config.task.name and jax.process_count() == 1
    data, at_end = run.data, step >= last
    held_out = data.tokens(EVAL) if isinstance(data, shards.Prepared) else len(data.eval)
    return Due(
        bool(held_out) and (at_end or is_due(step, train.eval_every)),
        bool(samples) and (at_end or is_due(step, train.sample_every)),
    )


def answers_due(run: Run, *, at_end: bool) -> bool:
    """Whether an evaluation has the task's answers too."""
    answered = run.config.task.eval_samples and isinstance(run.data, loading.Examples)
    in_time = at_end or task_of(run.config.task).samples_rollouts
    return bool(answered) and in_time and jax.process_count() == 1


def owed(run: Run, step: int, last: int) -> Due:
    """What was due after the step that a run resumes from, and left no record."""
    if not step:
        return Due(False, False)
    due, recorded = due_at(run, step, last), recorded_at(run.workdir, step)
    groups = ["eval/"] if not task_of(run.config.task).samples_rollouts else []
    if answers_due(run, at_end=step >= last):
        groups.append("answers/")
    evaluated = all(any(name.startswith(group) for name in recorded) for group in groups)
    evaluated = distributed.of_first_process(evaluated)  # which alone writes records
    sampled = os.path.exists(sample_path(run, step))  # False where it may not be looked at
    return Due(due.evaluate and not evaluated, due.sample and not sampled)


def recorded_at(workdir: Path, step: int) -> dict[str, Any]:
    """All values that metrics.jsonl has of a step."""
    values: dict[str, Any] = {}
    for record in jsonl.read_jsonl(workdir / jsonl.FILE):
        if record["step"] == step:
            values |= record
    return values


def sample_text(run: Run, params: Params) -> str:
    """What the parameters write after train.sample_prompt."""
    config, train = run.config, run.config.train
    lm = LanguageModel(config.model, params, run.tokenizer, mesh=run.mesh)
    fits = config.model.context + 1 - len(lm.encode(train.sample_prompt))
    completion = lm.generate(
        train.sample_prompt,
        max_new_tokens=max(min(train.sample_tokens, fits), 1),
        temperature=0.7,
        top_p=0.9,
        seed=train.seed,
    )
    return train.sample_prompt + completion.text


def sample_path(run: Run, step: int) -> Path:
    return run.workdir / "samples" / f"{step}.txt"


def write_sample(run: Run, step: int, text: str) -> None:
    """Keeps a sample. It only reports, so a disk without space is said and ends nothing."""
    files.report_text(sample_path(run, step), text + "\n")


def evaluate_task(run: Run, step: int, params: Params) -> dict[str, float]:
    """A task's own scores on task.eval_samples held-out examples; answers in samples/<step>.txt."""
    assert isinstance(run.data, loading.Examples)
    config, labels = run.config, run.data.labels
    examples = subsample_evenly(run.data.eval, config.task.eval_samples)
    lm = LanguageModel(config.model, params, run.tokenizer, mesh=run.mesh)
    answered = answers.answer_examples(lm, config.task, labels, examples)
    text = "\n\n".join(
        answers.format_answer(run.tokenizer, example, answer)
        for example, answer in zip(examples[:20], answered, strict=False)
    )
    write_sample(run, step, text)
    scores = task_of(config.task).evaluate(config.task, labels, examples, answered)
    return {f"answers/{name}": metric.value for name, metric in scores.items()}


def finish(
    run: Run, step: int, *, status: str, records: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Marks the run, writes its report, returns the summary.

    records: the newest of this process, whether metrics.jsonl has them or not.
    """
    summary: dict[str, Any] = {"workdir": str(run.workdir), "step": step, "status": status}
    if jax.process_index() > 0:
        return summary
    newest: dict[str, Any] = {}
    evaluated = 0
    for record in [*jsonl.read_jsonl(run.workdir / jsonl.FILE), *records]:
        newest |= record
        if any(name.startswith(progress.SCORE_GROUPS) for name in record):
            evaluated = record["step"]
    scores = ("train/loss", *progress.SCORE_GROUPS)
    summary |= {name: value for name, value in newest.items() if name.startswith(scores)}
    if 0 < evaluated < step:
        summary["evaluated_step"] = evaluated  # the scores are not of the last step
    report.mark(run.workdir, status=status, step=step)
    if status != "interrupted":  # a scheduler's grace period is short
        written = report.write(
            run.workdir, run.data if isinstance(run.data, shards.Prepared) else None
        )
        if not written:
            return summary
    summary["report"] = str(run.workdir / "report.html")
    return summary
