"""Documents to token shards on disk, once, for corpora that are too large for the cache.

    python -m gptjax.data.prepare --config=configs/gpt2_124m.py --out=data/openwebtext

Then train with --config.data.source=shards --config.data.path=data/openwebtext. An interrupted
command goes on after its last finished shard and ends in the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gptjax.core import cli
from gptjax.data.shards import prepare


def main(argv: list[str]) -> None:
    """Writes the shards and prints a summary."""
    args = cli.parse(argv, __doc__, {"out": "folder for the shards"}, required=("config", "out"))
    prepared = prepare(args.config, Path(args["out"]))
    summary: dict[str, Any] = {
        "folder": str(prepared.folder),
        "fingerprint": prepared.fingerprint,
        "vocab_size": prepared.tokenizer.vocab_size,
    }
    for split, shards in prepared.splits.items():
        summary[split] = {
            "shards": len(shards),
            "tokens": prepared.tokens(split),
            "documents": sum(shard["documents"] for shard in shards),
        }
    cli.result(summary, args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
