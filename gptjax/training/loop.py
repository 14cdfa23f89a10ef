"""Trains a GPT: pretraining and fine-tuning by the same loop.

    python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.train.steps=500 ...]

--print_config shows every knob resolved, --explain each derived number and why; neither trains. The same command resumes a run that
was stopped: SIGTERM and Ctrl-C save first, and after a kill it goes on from the newest whole checkpoint with the same numbers.
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax

from gptjax.checkpoints.store import Checkpoints
from gptjax.checkpoints.workdir import fault, read_meta, steps_in
from gptjax.config import checks, schema
from gptjax.config.errors import UserError
from gptjax.core import cli, files, tree
from gptjax.data import loader, shards
from gptjax.data.rows import subsample_evenly
from gptjax.data.sources import EVAL
from gptjax.evaluation import answers
from gptjax.evaluation.held_out import held_out_scores, summary_line
from gptjax.generation.language_model import LanguageModel
from gptjax.model import init as model_init
from gptjax.model import lora
from gptjax.runtime import sharding
from gptjax.runtime.devices import memory, peak_flops
from gptjax.tasks import loading
from gptjax.tasks.table import task_of
from gptjax.tracking import progress
from gptjax.tracking.base import TrackedRun
from gptjax.tracking.jsonl import read_jsonl
from gptjax.tracking.progress import Progress
from gptjax.tracking.throughput import StepMetrics, flops_per_token
from gptjax.tracking.trackers import Trackers
from gptjax.training import batches, report, rollouts
from gptjax.training import step as train_step
from gptjax.training.setup import Run


def sample(run: Run, step: int, params: Any) -> str:
    """One sample from the current parameters, also in samples/<step>.txt."""
    c, t = run.config, run.config.train
    lm = LanguageModel(c.model, params, run.tokenizer)
    limit = min(t.sample_tokens, c.model.context + 1 - len(lm.encode(t.sample_prompt)))
    text = (
        t.sample_prompt
        + lm.generate(
            t.sample_prompt, max_new_tokens=max(limit, 1), temperature=0.7, top_p=0.9, seed=t.seed
        ).text
    )
    files.write_text(run.workdir / "samples" / f"{step}.txt", text + "\n")
    return text


def evaluate_task(run: Run, step: int, params: Any) -> dict[str, float]:
    """A task's own scores on task.eval_samples of the held-out examples; what was answered is in samples/<step>.txt."""
    assert isinstance(run.data, loading.Examples)
    c, examples = run.config, subsample_evenly(run.data.eval, run.config.task.eval_samples)
    lm = LanguageModel(c.model, params, run.tokenizer)
    found = answers.answer_examples(lm, c.task, run.data.labels, examples)
    shown = "\n\n".join(
        answers.format_answer(run.tokenizer, e, a)
        for e, a in zip(examples[:20], found, strict=False)
    )
    files.write_text(run.workdir / "samples" / f"{step}.txt", shown + "\n")
    scores = task_of(c.task).evaluate(c.task, run.data.labels, examples, found)
    return {f"answers/{name}": metric.value for name, metric in scores.items()}


def save_best(run: Run, state: Any, loss: float) -> None:
    """Keeps the state under best/ where its held-out loss is the lowest so far, and only then."""
    folder = run.workdir / "best"
    kept = [
        read_meta(folder / str(s))["eval_loss"]
        for s in steps_in(folder)
        if not fault(folder / str(s), ("meta/",))
    ]
    if loss < min(kept, default=math.inf):
        best = Checkpoints(folder, keep=1)
        best.save(state, {**run.meta, "eval_loss": loss}, wait=True)
        best.close()


def train(run: Run) -> dict[str, Any]:
    """From a new state or the newest checkpoint to the last step. Returns the summary that the command prints."""
    c, t = run.config, run.config.train
    shapes, _, _ = train_step.state_shapes(c)
    places = sharding.shardings(run.mesh, shapes)
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=t.max_to_keep)
    found = checkpoints.restore(shapes, places)
    given = run.source.params if run.source else None
    state, frozen = (
        (found[0], train_step.place_frozen(c, run.mesh, given))
        if found
        else train_step.init_state(c, run.mesh, given)
    )
    del given
    start, run.source = int(state.step), None
    cli.say(
        f"continue after step {start}"
        if found
        else f"new run in {run.workdir}" + f", parameters from {t.init_from}" * bool(t.init_from)
    )
    count = (
        f"{tree.size(state.params):,} parameters"
        + f" on {tree.size(frozen):,} frozen ones" * bool(frozen)
    )
    first_device = jax.local_devices()[0]
    held = tree.bytes_on_device(state, first_device)
    cli.say(
        f"{count}; state {tree.nbytes(state) / 2**20:,.1f} MiB, {held / 2**20:,.1f} MiB of it on {first_device}"
    )
    last = min(t.steps, t.stop_at or t.steps)
    if start >= last:
        checkpoints.close()
        return finish(run, start, status="finished" if start >= t.steps else "stopped")
    loop = Loop(run, state, frozen, checkpoints)
    try:
        status = loop.until(last)
    except UserError:
        if jax.process_index() == 0:
            report.mark(run.workdir, status="failed")
        raise
    finally:
        loop.close()
    if status == "failed to save":
        raise UserError(
            f"the checkpoint of step {loop.step} could not be written to {run.workdir} (see above): free some space and run the same command again"
        )
    return finish(run, loop.step, status=status)


class Loop:
    """The steps of a run: what they change (`state`, `step`), the compiled steps, and where batches come from and records go."""

    def __init__(self, run: Run, state: Any, frozen: Any, checkpoints: Checkpoints) -> None:
        c, t = run.config, run.config.train
        self.run, self.state, self.frozen, self.checkpoints, self.step = (
            run,
            state,
            frozen,
            checkpoints,
            int(state.step),
        )
        self.task = task_of(c.task)
        self.batches = rollouts.feed(run, self.step, state.params, frozen)
        self.batch, self.extra = self.batches.next(
            self.step, state.params
        )  # extra: what is recorded beside the step's own metrics
        began = time.monotonic()
        self.train_step = (
            train_step.make_train_step(c, run.mesh).lower(state, self.batch, frozen).compile()
        )  # ahead of time: no second compile can happen
        self.eval_step = train_step.make_eval_step(c, run.mesh)
        self.compile_seconds = time.monotonic() - began
        cli.say(
            f"compiled the step in {self.compile_seconds:.1f} s ({run.compiles.hits} programs from the cache, {run.compiles.misses} new)"
        )
        self.recent = StepMetrics(t.batch_size * c.length)
        self.peak, self.flops = (
            peak_flops(jax.devices()[0]),
            flops_per_token(c, model_init.count_params(c.model)),
        )
        self.tracker = None
        if jax.process_index() == 0:
            tracked = TrackedRun(run.workdir, start=self.step, config=schema.to_dict(c))
            self.tracker = Trackers(t.trackers, tracked)
        self.progress = Progress(start=self.step, steps=t.steps)

    def until(self, last: int) -> str:
        """Steps until `last` or until stopped. Returns the run's status."""
        run, t = self.run, self.run.config.train
        profile, tracing, waited = checks.profile_range(run.config), False, 0.0
        held_out = batches.with_reference(
            run, run.split(EVAL), EVAL, self.step, self.state.params, self.frozen
        )
        due = lambda every: bool(every and self.step % every == 0) or self.step == last
        run.stop.grace = True
        self.progress.begin()
        self.recent.restart_clock()
        while self.step < last:
            if profile and self.step + 1 == profile[0]:
                jax.profiler.start_trace(str(run.workdir / "profile"))
                tracing = True
            self.state, step_metrics = self.train_step(self.state, self.batch, self.frozen)
            self.step += 1
            self.recent.add(step_metrics | self.extra, waited)
            stopping = run.stop.now(self.step)
            if tracing and profile and (stopping or self.step in (last, profile[1])):
                jax.block_until_ready(self.state)
                jax.profiler.stop_trace()
                tracing = False
            if any(map(due, (t.log_every, t.save_every, t.eval_every, t.sample_every))) or stopping:
                self.log()
            # saved before anything that takes long or may fail
            if (due(t.save_every) or stopping) and not self.save(
                wait=stopping or self.step == last
            ):
                return "failed to save"
            if stopping:
                return "interrupted"
            if due(t.eval_every) and held_out.count:
                self.evaluate(held_out, answers=self.step == last or self.task.samples_rollouts)
            if (
                due(t.sample_every)
                and t.sample_tokens
                and jax.process_count() == 1
                and not run.config.task.name
            ):
                self.progress.note(
                    self.step,
                    sample(
                        run,
                        self.step,
                        lora.apply_adapter(run.config.lora, self.frozen, self.state.params),
                    ),
                )
            if self.step < last:
                asked = time.monotonic()
                self.batch, self.extra = self.batches.next(self.step, self.state.params)
                waited = time.monotonic() - asked
            if due(t.eval_every) or due(t.sample_every):
                self.recent.restart_clock()
        return "finished" if self.step == t.steps else "stopped"

    def log(self) -> None:
        """Means since the last record, to the terminal and the trackers."""
        c, values = self.run.config, self.recent.flush(self.step)
        if not values:
            return
        values |= {"train/tokens": float(self.step) * c.train.batch_size * c.length, **memory()}
        values |= {
            "perf/compile_seconds": self.compile_seconds,
            "perf/compiles": float(self.run.compiles.count),
        }
        if self.peak:
            values["perf/mfu"] = (
                values["perf/tokens_per_sec"] * self.flops / (self.peak * jax.device_count())
            )
        self.progress.show(self.step, values)
        if self.tracker:
            self.tracker.log(self.step, values)

    def save(self, *, wait: bool) -> bool:
        """Whether the checkpoint was written, or (without `wait`) begun. Raises UserError for parameters that are not finite."""
        if not bool(train_step.all_finite(self.state.params)):
            raise UserError(
                f"step {self.step}: a parameter is not finite; the run stops and keeps the last checkpoint.\n"
                "Lower optim.lr or raise optim.eps, in a new --workdir."
            )
        if self.checkpoints.save(self.state, self.run.meta, wait=wait) or not wait:
            return True
        return jax.process_count() == 1 and self.checkpoints.save(
            self.state, self.run.meta, wait=True
        )  # once more: a failure may pass

    def evaluate(self, held_out: loader.Split, *, answers: bool) -> None:
        """Scores of the held-out split and, where a task judges them, of `answers`; keeps the best state."""
        run, c, params = self.run, self.run.config, self.state.params
        values = {}
        if not self.task.samples_rollouts:  # whose objective needs answers
            values = held_out_scores(
                c, run.mesh, held_out, run.tokenizer, self.eval_step, params, self.frozen
            )
        if (
            answers
            and isinstance(run.data, loading.Examples)
            and c.task.eval_samples
            and jax.process_count() == 1
        ):
            values |= evaluate_task(run, self.step, lora.apply_adapter(c.lora, self.frozen, params))
        self.progress.note(self.step, summary_line(values))
        if self.tracker:
            self.tracker.log(self.step, values)
        if c.train.keep_best:
            headline = values.get(f"answers/{self.task.headline}", 0.0)
            save_best(run, self.state, values.get("eval/loss", -headline))

    def close(self) -> None:
        for part in (self.progress, self.batches, self.checkpoints, self.tracker):
            if part:
                part.close()


def finish(run: Run, step: int, *, status: str) -> dict[str, Any]:
    """Marks the run, writes its report, returns the summary."""
    summary: dict[str, Any] = {"workdir": str(run.workdir), "step": step, "status": status}
    if jax.process_index() == 0:
        records = (
            read_jsonl(run.workdir / "metrics.jsonl")
            if (run.workdir / "metrics.jsonl").exists()
            else []
        )
        latest = {name: value for record in records for name, value in record.items()}
        summary |= {
            name: value
            for name, value in latest.items()
            if name == "train/loss" or name.startswith(progress.SCORE_GROUPS)
        }
        report.mark(run.workdir, status=status, step=step)
        if status != "interrupted":  # a scheduler's grace period is short
            report.write(run.workdir, run.data if isinstance(run.data, shards.Prepared) else None)
        summary["report"] = str(run.workdir / "report.html")
    return summary
