"""How good a checkpoint is: held-out loss, a task's scores with intervals, bits per byte, probes.

    python -m gptjax.evaluate --checkpoint=runs/sst[,OTHER,...]
        [--config=configs/finetune_sentiment.py] [--path=test.jsonl] [--out=FOLDER]
    python -m gptjax.evaluate --checkpoint=PATH --text=FILES
    python -m gptjax.evaluate --checkpoint=PATH --probes[=FILE.json]
    python -m gptjax.evaluate --checkpoint=PATH --harness=TASK,TASK

A task's config comes from --config, or from the first checkpoint's workdir; then a run of the same
task is evaluated with its own prompt. --path is a file in the form of its data, such as a test
split, or the split's name in a data set that has several (default: the held-out split). Several
checkpoints, and the baselines that the task knows, are compared with the first on the examples
that fit all of them. --harness runs tasks of lm-evaluation-harness.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.data import selection
from gptjax.data.readers.finding import find_files
from gptjax.data.readers.opening import read_text
from gptjax.data.records import subsample_evenly
from gptjax.evaluation.compare import Comparison, compare, run_config, table, to_json
from gptjax.evaluation.held_out import text_scores
from gptjax.generation import language_model
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.tasks.table import task_of

FLAGS = {
    "checkpoint": "workdir, Hugging Face folder, .gguf file; several with a comma between",
    "path": "a file of examples in the task's form, such as a test split, or a split's name",
    "limit": "examples taken, spread over the file (all)",
    "out": "folder for predictions, a jsonl a checkpoint",
    "text": "file, folder or glob of text: perplexity and bits per byte",
    "probes": "bias and safety probes; =FILE.json for your own",
    "harness": "tasks of lm-evaluation-harness, with a comma between",
    "mesh": "devices, such as tensor=4,data=2: heads and vocabulary over tensor, texts over data",
}


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint",), config=True)
    enable_compile_cache()
    names, limit = args["checkpoint"].split(","), args.number("limit", 0)
    if len(set(names)) < len(names):
        raise UserError("--checkpoint names one twice")
    out = Path(args["out"]) if args["out"] else None
    if args["text"]:
        if out:
            raise UserError(
                "--out is for predictions and probes, and --text makes none: leave it out"
            )
        comparisons, headline = _compare_on_text(names, args, limit), "bits_per_byte"
    elif "probes" in args or "harness" in args:
        if len(names) > 1:
            raise UserError(
                f"--probes and --harness look at one checkpoint, not at {len(names)}: "
                "run them for each"
            )
        if "harness" in args:
            _run_harness(args, names[0], limit)
        else:
            _run_probes(args, names[0], out)
        return
    else:
        of_run = args.settings is None
        config = task_config(names[0]) if of_run else args.config
        if not config.task.name:
            raise UserError("the config has no task.name: use --text for the loss of a text")
        comparisons = compare(
            config,
            names,
            path=args["path"],
            limit=limit,
            out=out,
            own_prompts=of_run,
            mesh=args["mesh"],
        )
        headline = task_of(config.task).headline
    print(to_json(comparisons) if "json" in args else table(comparisons, headline))


def task_config(checkpoint: str) -> Config:
    """The config of a run that tuned a task. Raises UserError."""
    config = run_config(checkpoint)
    if config is None or not config.task.name:
        raise UserError(
            f"{checkpoint} names no task: give --config=configs/..., "
            "or --text, --probes or --harness"
        )
    return config


def _compare_on_text(names: list[str], args: cli.Args, limit: int) -> list[Comparison]:
    input_files = find_files(args["text"], (".txt", ".md", ".text"))
    texts = [read_text(path) for path in subsample_evenly(input_files.paths, limit)]
    selection.say({"text": dataclasses.replace(input_files.selection, documents=len(texts))})
    scores = lambda name: text_scores(language_model.load(name, mesh=args["mesh"]), iter(texts))
    return [Comparison(name, scores(name)) for name in names]


def _run_harness(args: cli.Args, name: str, limit: int) -> None:
    lm = language_model.load(name, mesh=args["mesh"])
    from gptjax.evaluation.harness import evaluate_tasks  # lm_eval is an extra

    results = evaluate_tasks(lm, args["harness"].split(","), limit=limit or None)
    print(json.dumps(results, indent=1, default=str))


def _run_probes(args: cli.Args, name: str, out: Path | None) -> None:
    lm = language_model.load(name, mesh=args["mesh"])
    from gptjax.evaluation import probes

    path = probes.PROBES if args["probes"] == "true" else Path(args["probes"])
    report = probes.run_probes(lm, probes.load_probes(path))
    if out:
        files.write_text(out / "probes.html", probes.to_html(report))
        cli.say(f"wrote {out / 'probes.html'}")
    print(json.dumps(report.rows()) if "json" in args else probes.to_text(report))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
