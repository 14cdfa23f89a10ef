"""TODO docstring."""

from __future__ import annotations

import sys
from pathlib import Path

from gptjax.checkpoints.formats import FORMATS, TOLERANCE, convert, export_adapters
from gptjax.config.errors import UserError, unknown_name
from gptjax.core import cli
from gptjax.runtime.memory import return_freed_memory


def main(argv: list[str]) -> None:
    flags = {
        "from": "workdir, Hugging Face folder or .gguf file",
        "to": "new folder or .gguf file",
        "format": "hf, gguf or gptjax (hf, or gguf where --to ends in .gguf); peft: a run's adapters alone",
        "dtype": "float32, bfloat16, float16, or q8_0 in GGUF (as stored)",
    }
    args = cli.parse(argv, __doc__, flags, required=("from", "to"))
    target = Path(args["to"])
    form = args["format"] or ("gguf" if target.suffix == ".gguf" else "hf")
    if form == "peft":
        cli.result(export_adapters(args["from"], target), args)
        return
    if form not in FORMATS:
        raise UserError(f"--format={form}: {unknown_name('format', form, [*FORMATS, 'peft'])}")
    if args["dtype"] and args["dtype"] not in TOLERANCE:
        raise UserError(
            f"--dtype={args['dtype']}: {unknown_name('dtype', args['dtype'], list(TOLERANCE))}"
        )
    return_freed_memory()
    cli.result(convert(args["from"], target, form=form, dtype=args["dtype"]), args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
