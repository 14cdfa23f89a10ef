"""Documents of a run: text files, one field of records, or the embedded corpus.

In: a `DataConfig`. Out: a `Source` with a fingerprint of the content and the documents of each
split.

To add a source, add a row to SOURCES: a function that reads records, in a new file in `readers/`,
or one that opens documents. The choices of the setting `data.source` are read from this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core import files
from gptjax.core.files import decode
from gptjax.data.readers import csv, datasets, jsonl, lines, parquet, sotu, squad, tfds
from gptjax.data.readers.finding import Files, find_files, listed_files
from gptjax.data.records import SplitRecords, is_held_out
from gptjax.data.selection import Selection

TRAIN, EVAL = "train", "eval"


@dataclasses.dataclass(frozen=True)
class Documents:
    """`count` documents in a fixed order, and a hash of their content."""

    count: int
    fingerprint: str
    read: Callable[[], Iterator[str]]
    selection: Selection


@dataclasses.dataclass(frozen=True)
class Source:
    """`documents("train")` and `documents("eval")`, both deterministic.

    selections: what was taken and left out, of the data and of held-out data of its own.
    """

    fingerprint: str
    documents: Callable[[str], Iterator[str]]
    selections: dict[str, Selection] = dataclasses.field(default_factory=dict)


def _check_path(config: DataConfig) -> str:
    """What the config lacks, or ""."""
    if config.path:
        return ""
    return (
        f"data.path is empty and data.source = {config.source!r} needs it: "
        "--config.data.path=FILE_OR_FOLDER"
    )


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """One value of `data.source`; functions take (config, path, split).

    read_records: records with named fields; None where there are none.
    open_documents: documents; None = the field `data.field` of each record.
    check: what the config lacks, in a sentence, or "".
    has_eval_split: whether a data set with named splits has a held-out one; None = it has no names.
    """

    read_records: Callable[[DataConfig, str, str], SplitRecords] | None = None
    open_documents: Callable[[DataConfig, str, str], Documents] | None = None
    check: Callable[[DataConfig], str] = _check_path
    has_eval_split: Callable[[DataConfig], bool] | None = None

    @property
    def has_named_splits(self) -> bool:
        """Whether splits are names within a data set, and not files."""
        return self.has_eval_split is not None


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """The records of one split of the config's source, at `path`. Raises UserError."""
    read = SOURCES[config.source].read_records
    assert read is not None, config.source  # the checks of a config see to it
    return read(config, path, split)


def has_eval_split(config: DataConfig) -> bool:
    """Whether the data set has named splits, and a held-out one among them."""
    has_split = SOURCES[config.source].has_eval_split
    return has_split is not None and has_split(config)


def open_source(config: DataConfig) -> Source:
    """The documents of both splits.

    Raises UserError for a missing path, an empty set, text that is not UTF-8 or a field that is
    not there.
    """
    open_documents = SOURCES[config.source].open_documents or _open_field
    main = open_documents(config, config.path, config.train_split)
    if not main.count:
        raise UserError(
            f"data.path = {config.path!r}: no documents in it; check the path and data.field"
        )
    held_out = None
    if config.eval_path or has_eval_split(config):
        held_out = open_documents(config, config.eval_path or config.path, config.eval_split)

    def documents(split: str) -> Iterator[str]:
        if held_out is None:
            yield from _split(main, split, config)
        else:
            yield from (main if split == TRAIN else held_out).read()

    rule = held_out.fingerprint if held_out else f"{config.source} {config.eval_fraction}"
    selections = {"data": main.selection}
    if held_out:
        selections["held-out data"] = held_out.selection
    return Source(files.digest(main.fingerprint, rule), documents, selections)


def _split(documents: Documents, split: str, config: DataConfig) -> Iterator[str]:
    """Documents spread evenly over the set are held out; of a single document, its end."""
    n, fraction = documents.count, config.eval_fraction
    if n == 1 and fraction:
        text = next(documents.read())
        cut = int(len(text) * (1 - fraction))
        yield text[:cut] if split == TRAIN else text[cut:]
        return
    for i, text in enumerate(documents.read()):
        if is_held_out(i, count=n, fraction=fraction) == (split == EVAL):
            yield text


def _open_files(found: Files) -> Documents:
    def read() -> Iterator[str]:
        for p in found.paths:
            yield decode(p.read_bytes(), str(p))

    selection = dataclasses.replace(found.selection, documents=len(found.paths))
    return Documents(len(found.paths), files.digest(*found.checksums), read, selection)


def _open_text(config: DataConfig, path: str, split: str) -> Documents:
    """Each file is a document."""
    return _open_files(find_files(path, (".txt", ".md", ".text")))


def _open_sotu(config: DataConfig, path: str, split: str) -> Documents:
    """Each message is a document, in order of date."""
    return _open_files(listed_files("sotu", [p for p, _ in sotu.list_messages()]))


def _open_field(config: DataConfig, path: str, split: str) -> Documents:
    """One field of each record is a document."""
    records = read_records(config, path, split)

    def read() -> Iterator[str]:
        for record in records.read():
            yield record.text(config.field)

    next(read(), "")  # a wrong field is reported before a tokenizer is trained
    fingerprint = files.digest(config.field, records.fingerprint)
    return Documents(records.count, fingerprint, read, records.selection)


SOURCES: dict[str, SourceKind] = {
    "sotu": SourceKind(sotu.read_records, _open_sotu, check=lambda config: ""),
    "text": SourceKind(open_documents=_open_text),
    "jsonl": SourceKind(jsonl.read_records),
    "csv": SourceKind(csv.read_records),
    "lines": SourceKind(lines.read_records),
    "squad": SourceKind(squad.read_records),
    "parquet": SourceKind(parquet.read_records),
    "tfds": SourceKind(tfds.read_records, check=tfds.check, has_eval_split=tfds.has_eval_split),
    "datasets": SourceKind(
        datasets.read_records, check=datasets.check, has_eval_split=datasets.has_eval_split
    ),
    "shards": SourceKind(),  # prepared before: `shards.py` opens them
}
