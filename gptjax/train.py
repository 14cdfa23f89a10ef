"""Trains a GPT: pretraining and fine-tuning by the same loop.

    python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart \\
        [--config.train.steps=500 ...]

--print_config shows every setting, resolved, and trains nothing; `python -m gptjax.plan` shows each
derived number and why. The same command resumes a run that was stopped: SIGTERM and Ctrl-C save
first, and after a kill it goes on from the newest intact checkpoint with the same numbers.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import jax

from gptjax.config import build, schema
from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.runtime.compile_cache import Compiles, enable_compile_cache
from gptjax.runtime.distributed import start_distributed
from gptjax.runtime.interrupt import Stop
from gptjax.runtime.memory import keep_freed_memory
from gptjax.training.loop import train
from gptjax.training.setup import setup

FLAGS = {
    "workdir": "folder of the run",
    "print_config": "print every setting, resolved, and stop",
    "profile_steps": "first:last steps to trace; short for --config.train.profile_steps",
    "distributed": "start jax.distributed from the cluster's environment",
}


def main(argv: list[str]) -> None:
    if any(arg.partition("=")[0] == "--explain" for arg in argv):
        raise UserError("no flag '--explain'; python -m gptjax.plan --config=... prints that page")
    args = cli.parse(argv, __doc__, FLAGS, required=("config",))
    if "profile_steps" in args:
        build.override(args.settings, {"train.profile_steps": args["profile_steps"]})
    config = args.config
    if "print_config" in args:
        print(schema.to_json(config))
        return
    if not args["workdir"]:
        raise UserError("missing --workdir: the folder for checkpoints, metrics and the report")
    start_distributed("distributed" in args)
    enable_compile_cache()
    keep_freed_memory()
    stop, compiles, workdir = Stop(), Compiles(), Path(args["workdir"])
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file: name a folder")
    with files.lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        run = setup(config, workdir, args.overrides, stop, compiles)
        with jax.set_mesh(run.mesh):
            summary = train(run)
    try:
        if jax.process_index() == 0:
            cli.result(summary, args)
    finally:  # that it was interrupted matters more than a summary that could not be written
        if summary["status"] == "interrupted":
            raise SystemExit(130)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
