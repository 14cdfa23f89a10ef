"""Checkpoints in and out: a workdir, a Hugging Face folder or a GGUF file, written as another.

    python -m gptjax.convert --from=PATH --to=PATH [--format=hf|gguf|gptjax|peft]
                             [--dtype=float32|bfloat16|float16|q8_0]

What was written is read again, and its logits are compared with the original's before success is
reported. Tensors are written one by one, so memory holds the model once. --dtype defaults to the
one that the checkpoint is stored in.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gptjax.checkpoints.formats import FORMATS, TOLERANCE, convert, export_adapters
from gptjax.config.errors import UserError, unknown_name
from gptjax.core import cli
from gptjax.runtime.memory import return_freed_memory

FLAGS = {
    "from": "workdir, Hugging Face folder or .gguf file",
    "to": "new folder or .gguf file",
    "format": "hf, gguf or gptjax (hf, or gguf where --to ends in .gguf); "
    "peft: a run's adapters alone",
    "dtype": "float32, bfloat16, float16, or q8_0 in GGUF (as stored)",
}


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("from", "to"))
    target, dtype = Path(args["to"]), args["dtype"]
    form = args["format"] or ("gguf" if target.suffix == ".gguf" else "hf")
    if form == "peft":
        cli.result(export_adapters(args["from"], target), args)
        return
    if form not in FORMATS:
        raise UserError(f"--format={form}: {unknown_name('format', form, [*FORMATS, 'peft'])}")
    if dtype and dtype not in TOLERANCE:
        raise UserError(f"--dtype={dtype}: {unknown_name('dtype', dtype, list(TOLERANCE))}")
    return_freed_memory()
    cli.result(convert(args["from"], target, form=form, dtype=dtype), args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
