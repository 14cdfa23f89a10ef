"""Shows which tokens of the examples are seen and which are learned, before any training.

    python -m gptjax.data.preview --config=configs/finetune_eras.py
        [--count=5] [--split=train] [--html=FILE]

In the terminal learned tokens are on green, a token that carries a label on yellow; --html writes
the same as a page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.data.records import subsample_evenly
from gptjax.tasks import loading
from gptjax.tasks.preview import to_html, to_terminal
from gptjax.training.setup import load_data, resolve_checkpoint


def main(argv: list[str]) -> None:
    flags = {
        "count": "examples to show (5)",
        "split": "train or eval (train)",
        "html": "write a page to this file",
    }
    args = cli.parse(argv, __doc__, flags, required=("config",))
    if not args.config.task.name:
        raise UserError(
            "the config has no task.name, so it has no examples: "
            "every token of its documents is learned"
        )
    if args["split"] not in ("", "train", "eval"):
        raise UserError(f"--split={args['split']}: must be train or eval")
    config, source = resolve_checkpoint(args.config)
    data = load_data(config, source)
    assert isinstance(data, loading.Examples)
    examples = subsample_evenly(
        data.eval if args["split"] == "eval" else data.train, args.number("count", 5)
    )
    if args["html"]:
        files.write_text(Path(args["html"]), to_html(data.tokenizer, examples))
        cli.say(f"wrote {args['html']}")
    colour = sys.stdout.isatty()
    print("\n\n".join(to_terminal(data.tokenizer, example, colour=colour) for example in examples))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
