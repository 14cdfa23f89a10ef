"""TODO docstring."""

from __future__ import annotations

import sys
from pathlib import Path

from gptjax.core import cli
from gptjax.data.shards import prepare


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, {"out": "folder for the shards"}, required=("config", "out"))
    prepared = prepare(args.config, Path(args["out"]))
    summary = {
        split: {
            "shards": len(s),
            "tokens": prepared.tokens(split),
            "documents": sum(x["documents"] for x in s),
        }
        for split, s in prepared.splits.items()
    }
    cli.result(
        {
            "folder": str(prepared.folder),
            "fingerprint": prepared.fingerprint,
            "vocab_size": prepared.tokenizer.vocab_size,
            **summary,
        },
        args,
    )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
