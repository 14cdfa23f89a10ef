"""Shows what a run would learn from, before any training: what is taken and left out, and examples.

    python -m gptjax.data.preview --config=configs/finetune_eras.py
        [--count=5] [--split=train] [--html=FILE]

Of a task, examples with the tokens that are seen and learned: in the terminal learned tokens are on
green, a token that carries a label on yellow; --html writes the same as a page. Of a config without
a task, the beginnings of the first documents.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.data import selection, shards, sources
from gptjax.data.records import subsample_evenly
from gptjax.tasks import loading
from gptjax.tasks.preview import to_html, to_terminal
from gptjax.training.setup import load_data, resolve_checkpoint

_SHOWN = 400  # characters of a document


def main(argv: list[str]) -> None:
    flags = {
        "count": "examples or documents to show (5)",
        "split": "train or eval (train)",
        "html": "tasks: write a page to this file",
    }
    args = cli.parse(argv, __doc__, flags, required=("config",))
    split, count = args["split"] or sources.TRAIN, args.number("count", 5)
    if split not in (sources.TRAIN, sources.EVAL):
        raise UserError(f"--split={split}: must be train or eval")
    if args.config.task.name:
        _show_examples(args, split, count)
        return
    if args["html"]:
        raise UserError(
            "--html is for the examples of a task, and the config has no task.name: leave it out"
        )
    documents = itertools.islice(_open_documents(args.config, split), count)
    print("\n\n".join(map(_beginning, documents, itertools.count(1))))


def _open_documents(config: Config, split: str) -> Iterator[str]:
    if config.data.source == "shards":
        prepared = shards.ensure(config)
        for tokens, offsets in prepared.arrays(split):
            for start, end in itertools.pairwise(offsets):
                yield prepared.tokenizer.decode(tokens[start + 1 : end].tolist())
        return
    source = sources.open_source(config.data)
    selection.say(source.selections)
    yield from source.documents(split)


def _beginning(text: str, number: int) -> str:
    rest = " ..." if len(text) > _SHOWN else ""
    return f"document {number}: {len(text):,} characters\n{text[:_SHOWN]}{rest}"


def _show_examples(args: cli.Args, split: str, count: int) -> None:
    config, source = resolve_checkpoint(args.config)
    data = load_data(config, source)
    assert isinstance(data, loading.Examples)
    examples = subsample_evenly(data.eval if split == sources.EVAL else data.train, count)
    if args["html"]:
        files.write_text(Path(args["html"]), to_html(data.tokenizer, examples))
        cli.say(f"wrote {args['html']}")
    colour = sys.stdout.isatty()
    print("\n\n".join(to_terminal(data.tokenizer, example, colour=colour) for example in examples))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
