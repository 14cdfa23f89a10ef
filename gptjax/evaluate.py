"""What a checkpoint is worth: held-out loss, a task's own scores with their intervals, any text's bits per byte, probes, lm-evaluation-harness.

    python -m gptjax.evaluate --checkpoint=runs/sst[,OTHER,...] [--config=configs/finetune_sentiment.py] [--path=test.jsonl] [--out=FOLDER]
    python -m gptjax.evaluate --checkpoint=PATH --text=FILES | --probes[=FILE.json] | --harness=TASK,TASK

A task's config comes from --config, or from the first checkpoint's workdir, and then a run of the same task is asked with its own prompt. --path
is a file in the form of its data, such as a test split, or the split's name in a data set that has several (default: the held-out split). Several
checkpoints, and the baselines that the task knows, are compared with the first on the examples that fit all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.data import rows
from gptjax.evaluation.compare import Comparison, compare, run_config, table, to_json
from gptjax.evaluation.held_out import text_scores
from gptjax.generation import language_model
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.tasks.table import task_of


def task_config(checkpoint: str) -> Config:
    """The config of a run that tuned a task. Raises UserError."""
    config = run_config(checkpoint)
    if config is None or not config.task.name:
        raise UserError(
            f"{checkpoint} names no task: give --config=configs/..., or --text, --probes or --harness"
        )
    return config


FLAGS = {
    "checkpoint": "workdir, Hugging Face folder, .gguf file; several with a comma between",
    "path": "a file of examples in the task's form, such as a test split, or a split's name",
    "limit": "examples taken, spread over the file (all)",
    "out": "folder for predictions, a jsonl a checkpoint",
    "text": "file, folder or glob of text: perplexity and bits per byte",
    "probes": "bias and safety probes; =FILE.json for your own",
    "harness": "tasks of lm-evaluation-harness, with a comma between",
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
        documents = rows.subsample_evenly(
            [p.read_bytes() for p in rows.paths_of(args["text"], (".txt", ".md", ".text"))], limit
        )
        texts = [files.decode(data, args["text"]) for data in documents]
        entries = [
            Comparison(name, text_scores(language_model.load(name), iter(texts))) for name in names
        ]
        headline = "bits_per_byte"
    elif "probes" in args or "harness" in args:
        if len(names) > 1:
            raise UserError(
                f"--probes and --harness look at one checkpoint, not at {len(names)}: run them for each"
            )
        _others(args, names[0], limit, out)
        return
    else:
        own = args.settings is None
        config = task_config(names[0]) if own else args.config
        if not config.task.name:
            raise UserError("the config has no task.name: use --text for the loss of a text")
        entries = compare(config, names, path=args["path"], limit=limit, out=out, own=own)
        headline = task_of(config.task).headline
    print(to_json(entries) if "json" in args else table(entries, headline))


def _others(args: cli.Args, name: str, limit: int, out: Path | None) -> None:
    lm = language_model.load(name)
    if "harness" in args:
        from gptjax.evaluation.harness import evaluate_tasks  # lm_eval is an extra

        found = evaluate_tasks(lm, args["harness"].split(","), limit=limit or None)
        print(json.dumps(found, indent=1, default=str))
        return
    from gptjax.evaluation import probes

    report = probes.run_probes(
        lm, probes.load_probes(probes.PROBES if args["probes"] == "true" else Path(args["probes"]))
    )
    if out:
        files.write_text(out / "probes.html", probes.to_html(report))
        cli.say(f"wrote {out / 'probes.html'}")
    print(json.dumps(report.rows()) if "json" in args else probes.to_text(report))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
