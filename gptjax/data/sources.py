"""Documents of a run: text files, one field of records, or the embedded corpus.

In: a `DataConfig`. Out: a `Source` with a fingerprint of the content and the documents of each
split.

To add a source, add a row to SOURCES: a function that reads records, in a new file in `readers/`,
or one that opens documents. The choices of the setting `data.source` are read from this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from gptjax.config.errors import UserError, nearest
from gptjax.config.schema import DataConfig
from gptjax.core import files
from gptjax.data.readers import csv, datasets, jsonl, lines, parquet, sotu, squad, tfds
from gptjax.data.readers.finding import Files, find_files, listed_files
from gptjax.data.readers.opening import read_text
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
    split_names: the splits of a data set, () where it has one alone; None = splits are files. Takes
        (config, path).
    """

    read_records: Callable[[DataConfig, str, str], SplitRecords] | None = None
    open_documents: Callable[[DataConfig, str, str], Documents] | None = None
    check: Callable[[DataConfig], str] = _check_path
    split_names: Callable[[DataConfig, str], tuple[str, ...]] | None = None


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """The records of one split of the config's source, at `path`. Raises UserError."""
    read = SOURCES[config.source].read_records
    assert read is not None, config.source  # the checks of a config see to it
    return read(config, path, split)


def training_split(config: DataConfig, path: str) -> str:
    """The name of the split at `path` that is trained on, "" where it has no named ones.

    Raises UserError where it has other names than data.train_split.
    """
    names_of = SOURCES[config.source].split_names
    if names_of is None:
        return ""
    names = names_of(config, path)
    if not names and config.train_split == "train":
        return ""
    return _existing_split(config, path, names, "data.train_split", config.train_split)


def held_out_split(config: DataConfig) -> tuple[str, str] | None:
    """(path, split) of held-out data of its own; None where training data are held out.

    Raises UserError where the split that data.eval_split names is not there.
    """
    path, asked = config.eval_path or config.path, config.eval_split
    names_of = SOURCES[config.source].split_names
    if names_of is None:
        return (path, "") if config.eval_path else None
    names = names_of(config, path)
    if asked:
        return path, _existing_split(config, path, names, "data.eval_split", asked)
    if "validation" in names:
        return path, "validation"
    if not config.eval_path:
        return None
    if len(names) > 1:
        raise UserError(
            f"data.eval_path = {path!r} has the splits {', '.join(names)}: "
            "name one with data.eval_split"
        )
    return path, names[0] if names else ""


def other_split(config: DataConfig, name: str) -> str:
    """`name` where the data set has a split of that name. Raises UserError."""
    names_of = SOURCES[config.source].split_names
    assert names_of is not None, config.source
    return _existing_split(config, config.path, names_of(config, config.path), "--path", name)


def _existing_split(
    config: DataConfig, path: str, names: tuple[str, ...], setting: str, split: str
) -> str:
    if split in names:
        return split
    data_set = config.name or path
    if not names:
        raise UserError(
            f"{data_set} has no splits, and {setting} = {split!r} names one: leave it out"
        )
    near = nearest(split, list(names))
    hint = f"did you mean {near!r}?" if near else "name one of these"
    raise UserError(
        f"{data_set} has no split {split!r}: it has {', '.join(names)}; {setting}: {hint}"
    )


def open_source(config: DataConfig) -> Source:
    """The documents of both splits.

    Raises UserError for a missing path, an empty set, text that is not UTF-8 or a field that is
    not there.
    """
    open_documents = SOURCES[config.source].open_documents or _open_field
    main = open_documents(config, config.path, training_split(config, config.path))
    if not main.count:
        raise UserError(
            f"data.path = {config.path!r}: no documents in it; check the path and data.field"
        )
    place = held_out_split(config)
    held_out = open_documents(config, *place) if place else None

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
            yield read_text(p)

    selection = dataclasses.replace(found.selection, documents=len(found.paths))
    return Documents(len(found.paths), files.digest(*found.checksums), read, selection)


def _open_text(config: DataConfig, path: str, split: str) -> Documents:
    """Each file is a document."""
    found = find_files(path, (".txt", ".md", ".text"), keep_duplicates=config.duplicates == "keep")
    return _open_files(found)


def _open_sotu(config: DataConfig, path: str, split: str) -> Documents:
    """Each message is a document, in order of date."""
    return _open_files(listed_files("sotu", [p for p, _ in sotu.list_messages()]))


def _open_field(config: DataConfig, path: str, split: str) -> Documents:
    """One field of each record is a document."""
    records = read_records(config, path, split)

    def read() -> Iterator[str]:
        for record in records.read_only([config.field]):
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
    "tfds": SourceKind(tfds.read_records, check=tfds.check, split_names=tfds.split_names),
    "datasets": SourceKind(
        datasets.read_records, check=datasets.check, split_names=datasets.split_names
    ),
    "shards": SourceKind(),  # prepared before: `shards.py` opens them
}
