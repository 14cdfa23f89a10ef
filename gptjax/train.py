"""Trains a GPT: pretraining and fine-tuning by the same loop.

    python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.train.steps=500 ...]

--print_config shows every knob resolved, --explain each derived number and why; neither trains. The same command resumes a run that
was stopped: SIGTERM and Ctrl-C save first, and after a kill it goes on from the newest whole checkpoint with the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

from gptjax import cli, evaluate, files, lora, metrics, model, policy, report, settings, sharding, steps, tree
from gptjax import config as config_lib
from gptjax.checkpoint import Checkpoints, fault, read_meta, steps_in
from gptjax.config import UserError
from gptjax.data import prepare
from gptjax.data.rows import spread
from gptjax.data.sources import EVAL, TRAIN
from gptjax.language_model import LanguageModel
from gptjax.metrics import Compiles, Progress, Tracker
from gptjax.run import Run, begin_from, load_data, resolve, rows_of_epoch, setup
from gptjax.tasks import load


def sample(run: Run, step: int, params: Any) -> str:
    """One sample from the current parameters, also in samples/<step>.txt."""
    c, t = run.config, run.config.train
    lm = LanguageModel(c.model, params, run.tokenizer)
    limit = min(t.sample_tokens, c.model.context + 1 - len(lm.encode(t.sample_prompt)))
    text = t.sample_prompt + lm.generate(t.sample_prompt, max_new_tokens=max(limit, 1), temperature=0.7, top_p=0.9, seed=t.seed).text
    files.write_text(run.workdir / "samples" / f"{step}.txt", text + "\n")
    return text


def judge(run: Run, step: int, params: Any) -> dict[str, float]:
    """A task's own scores on task.answers of the held-out examples; what was answered is in samples/<step>.txt."""
    assert isinstance(run.data, load.Examples)
    c, examples = run.config, spread(run.data.eval, run.config.task.answers)
    lm = LanguageModel(c.model, params, run.tokenizer)
    found = evaluate.answer(lm, c.task, run.data.labels, examples)
    shown = "\n\n".join(evaluate.shown(run.tokenizer, run.data.labels, e, a) for e, a in zip(examples[:20], found, strict=False))
    files.write_text(run.workdir / "samples" / f"{step}.txt", shown + "\n")
    scores = load.TASKS[c.task.name][0].judge(c.task, run.data.labels, examples, found)
    return {f"answers/{name}": metric.value for name, metric in scores.items()}


def save_best(run: Run, state: Any, loss: float) -> None:
    """Keeps the state under best/ where its held-out loss is the lowest so far, and only then."""
    folder = run.workdir / "best"
    kept = [read_meta(folder / str(s))["eval_loss"] for s in steps_in(folder) if not fault(folder / str(s), ("meta/",))]
    if loss < min(kept, default=math.inf):
        best = Checkpoints(folder, keep=1)
        best.save(state, {**run.meta, "eval_loss": loss}, wait=True)
        best.close()


def train(run: Run) -> dict[str, Any]:
    """The loop. Returns the summary that the command prints."""
    c, t = run.config, run.config.train
    shapes, _, _ = steps.state_shapes(c)
    places = sharding.shardings(run.mesh, shapes)
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=t.keep)
    found = checkpoints.restore(shapes, places)
    given = run.source.params if run.source else None
    state, frozen = (found[0], steps.place_frozen(c, run.mesh, given)) if found else steps.init_state(c, run.mesh, given)
    del given
    start, run.source = int(state.step), None
    cli.say(f"continue after step {start}" if found else f"new run in {run.workdir}" + f", parameters from {t.init_from}" * bool(t.init_from))
    count = f"{tree.size(state.params):,} parameters" + f" on {tree.size(frozen):,} frozen ones" * bool(frozen)
    first_device = jax.local_devices()[0]
    held = tree.bytes_on_device(state, first_device)
    cli.say(f"{count}; state {tree.nbytes(state) / 2**20:,.1f} MiB, {held / 2**20:,.1f} MiB of it on {first_device}")
    last = min(t.steps, t.stop_at or t.steps)
    if start >= last:
        checkpoints.close()
        return finish(run, start, status="finished" if start >= t.steps else "stopped")
    batches = policy.feed(run, start, state.params, frozen)
    first = batches.next(start, state.params)
    began = time.monotonic()
    train_step = steps.make_train_step(c, run.mesh).lower(state, first[0], frozen).compile()  # ahead of time: a second compile cannot happen
    eval_step = steps.make_eval_step(c, run.mesh)
    compile_seconds = time.monotonic() - began
    cli.say(f"compiled the step in {compile_seconds:.1f} s ({run.compiles.hits} programs from the cache, {run.compiles.misses} new)")
    tracker = Tracker(run.workdir, start=start) if jax.process_index() == 0 else None
    progress = Progress(start=start, steps=t.steps)
    try:
        outcome = loop(run, state, frozen, batches, first, last, train_step, eval_step, checkpoints, tracker, progress, compile_seconds)
    except UserError:
        if jax.process_index() == 0:
            report.mark(run.workdir, status="failed")
        raise
    finally:
        progress.close()
        batches.close()
        checkpoints.close()
        if tracker:
            tracker.close()
    _, step, status = outcome
    if status == "failed to save":
        raise UserError(
            f"the checkpoint of step {step} could not be written to {run.workdir} (see above): free some space and run the same command again"
        )
    return finish(run, step, status=status)


def loop(run: Run, state: Any, frozen: Any, batches: policy.Reads | policy.Rollouts, first: Any, last: int, train_step: Any, eval_step: Any, checkpoints: Checkpoints, tracker: Tracker | None, progress: Progress, compile_seconds: float) -> tuple[Any, int, str]:  # fmt: skip
    """Steps until `last` or until stopped. Returns (state, step, status)."""
    c, t = run.config, run.config.train
    recent, step, waited, (batch, extra) = metrics.StepMetrics(t.batch_size * c.length), int(state.step), 0.0, first
    peak = metrics.peak_flops(jax.devices()[0])
    flops = metrics.flops_per_token(c, model.count_params(c.model))
    profile, tracing = settings.profile_range(c), False

    def log() -> None:
        values = recent.flush(step)
        if not values:
            return
        values |= {"train/tokens": float(step) * t.batch_size * c.length, **metrics.memory()}
        values |= {"perf/compile_seconds": compile_seconds, "perf/compiles": float(run.compiles.count)}
        if peak:
            values["perf/mfu"] = values["perf/tokens_per_sec"] * flops / (peak * jax.device_count())
        progress.show(step, values)
        if tracker:
            tracker.log(step, values)

    def save(*, wait: bool) -> bool:
        if not bool(steps.all_finite(state.params)):
            raise UserError(
                f"step {step}: a parameter is not finite; the run stops and keeps the last checkpoint.\nLower optim.lr or raise optim.eps, in a new --workdir."
            )
        if checkpoints.save(state, run.meta, wait=wait) or not wait:
            return True
        return jax.process_count() == 1 and checkpoints.save(state, run.meta, wait=True)  # once more: a failure may pass

    held_out = policy.with_reference(run, run.split(EVAL), EVAL, step, state.params, frozen)
    judged = isinstance(run.data, load.Examples) and bool(c.task.answers) and jax.process_count() == 1
    due = lambda every: bool(every and step % every == 0) or step == last
    run.stop.grace = True
    progress.begin()
    recent.restart_clock()
    while step < last:
        if profile and step + 1 == profile[0]:
            jax.profiler.start_trace(str(run.workdir / "profile"))
            tracing = True
        state, step_metrics = train_step(state, batch, frozen)
        step += 1
        recent.add({**step_metrics, **extra}, waited)
        stopping = run.stop.now(step)
        if tracing and profile and (stopping or step in (last, profile[1])):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False
        if any(map(due, (t.log_every, t.save_every, t.eval_every, t.sample_every))) or stopping:
            log()
        # saved before anything that takes long or may fail
        if (due(t.save_every) or stopping) and not save(wait=stopping or step == last):
            return state, step, "failed to save"
        if stopping:
            return state, step, "interrupted"
        if due(t.eval_every) and held_out.count:
            values = {}
            if c.task.name != "grpo":  # its objective is judged on answers alone
                values = evaluate.held_out(c, run.mesh, held_out, run.tokenizer, eval_step, state.params, frozen)
            if judged and (step == last or c.task.name == "grpo"):
                values |= judge(run, step, lora.attach(c.lora, frozen, state.params))
            progress.note(step, evaluate.line(values))
            if tracker:
                tracker.log(step, values)
            if t.keep_best:
                save_best(run, state, values.get("eval/loss", -values.get("answers/reward", 0.0)))
        if due(t.sample_every) and t.sample_tokens and jax.process_count() == 1 and not c.task.name:
            progress.note(step, sample(run, step, lora.attach(c.lora, frozen, state.params)))
        if step < last:
            asked = time.monotonic()
            batch, extra = batches.next(step, state.params)
            waited = time.monotonic() - asked
        if due(t.eval_every) or due(t.sample_every):
            recent.restart_clock()
    return state, step, "finished" if step == t.steps else "stopped"


def finish(run: Run, step: int, *, status: str) -> dict[str, Any]:
    """Marks the run, writes its report, returns the summary."""
    summary: dict[str, Any] = {"workdir": str(run.workdir), "step": step, "status": status}
    if jax.process_index() == 0:
        records = metrics.read_jsonl(run.workdir / "metrics.jsonl") if (run.workdir / "metrics.jsonl").exists() else []
        latest = {name: value for record in records for name, value in record.items()}
        summary |= {name: value for name, value in latest.items() if name == "train/loss" or name.startswith(metrics.JUDGED)}
        report.mark(run.workdir, status=status, step=step)
        if status != "interrupted":  # a scheduler's grace period is short
            report.write(run.workdir, run.data if isinstance(run.data, prepare.Prepared) else None)
        summary["report"] = str(run.workdir / "report.html")
    return summary


def main(argv: list[str]) -> None:
    flags = {
        "workdir": "folder of the run",
        "print_config": "print every knob, resolved, and stop",
        "explain": "print each derived number and why, and stop",
        "profile_steps": "first:last steps to trace; short for --config.train.profile_steps",
        "distributed": "start jax.distributed from the cluster's environment",
    }
    args = cli.parse(argv, __doc__, flags, required=("config",))
    if "profile_steps" in args:
        settings.override(args.settings, {"train.profile_steps": args["profile_steps"]})
    config = args.config
    if "print_config" in args:
        print(config_lib.to_json(config))
        return
    if "explain" in args:
        config, source = begin_from(config)
        data = load_data(config, source)
        config = resolve(config, data)
        tokens = data.tokens(TRAIN) if isinstance(data, prepare.Prepared) else rows_of_epoch(config, data) * config.length
        print(report.explain(config, tokens))
        return
    if not args["workdir"]:
        raise UserError("missing --workdir: the folder for checkpoints, metrics and the report")
    sharding.start_distributed("distributed" in args)
    metrics.enable_compile_cache()
    metrics.keep_freed_memory()
    stop, compiles, workdir = cli.Stop(), Compiles(), Path(args["workdir"])
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file: name a folder")
    with files.lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        run = setup(config, workdir, args.overrides, stop, compiles)
        with jax.set_mesh(run.mesh):
            summary = train(run)
    if jax.process_index() == 0:
        cli.result(summary, args)
    if summary["status"] == "interrupted":
        raise SystemExit(130)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
