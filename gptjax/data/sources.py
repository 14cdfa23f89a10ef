"""Documents of a run: text files, one field of records, or the embedded corpus.

In: a `DataConfig`. Out: a `Source` with a fingerprint of the content and the documents of each
split.

To add a source, add a row to SOURCES: a function that reads records, in a new file in `readers/`,
or one that opens documents. The choices of the setting `data.source` are read from this table.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from gptjax.config.errors import UserError, nearest
from gptjax.config.schema import DataConfig
from gptjax.core import cli, files
from gptjax.data.documents import Documents
from gptjax.data.held_out import choose_split
from gptjax.data.readers import csv, datasets, jsonl, lines, parquet, sotu, squad, tfds
from gptjax.data.readers.finding import Files, find_files, listed_files
from gptjax.data.readers.opening import begins_as_html, read_text
from gptjax.data.records import SplitRecords
from gptjax.data.selection import Selection, counted, has_copies

TRAIN, EVAL = "train", "eval"


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
    path, name = config.eval_path or config.path, config.eval_split
    names_of = SOURCES[config.source].split_names
    if names_of is None:
        return (path, "") if config.eval_path else None
    names = names_of(config, path)
    if name:
        return path, _existing_split(config, path, names, "data.eval_split", name)
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


def say_other_splits(config: DataConfig) -> None:
    """Says that none of a data set's named splits is held out."""
    names_of = SOURCES[config.source].split_names
    names = names_of(config, config.path) if names_of else ()
    if len(names) > 1 and config.eval_fraction:
        cli.say(
            f"{config.name or config.path} has no split 'validation' (it has {', '.join(names)}): "
            f"some of {config.train_split!r} is held out; data.eval_split names another"
        )


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


def open_source(config: DataConfig, resumed: str = "") -> Source:
    """The documents of both splits.

    resumed: the fingerprint of a run that goes on; where an earlier version held out other text
    under the same settings, or took copies of files, that is done again. Raises UserError for a
    missing path, an empty set, text that is not UTF-8 or a field that is not there.
    """
    source = _open_source(config, resumed)
    if resumed not in ("", source.fingerprint) and has_copies(source.selections):
        with_copies = dataclasses.replace(config, duplicates="keep")  # as earlier versions did
        before = _open_source(with_copies, resumed)
        return before if before.fingerprint == resumed else source
    return source


def _open_source(config: DataConfig, resumed: str) -> Source:
    open_documents = SOURCES[config.source].open_documents or _open_field
    main = open_documents(config, config.path, training_split(config, config.path))
    if not main.count:
        setting = "data.separator" if config.separator else "data.field"
        raise UserError(
            f"data.path = {config.path!r}: no documents in it; check the path and {setting}"
        )
    place = held_out_split(config)
    held_out = open_documents(config, *place) if place else None
    split = choose_split(config, main, held_out, resumed)
    if not held_out:
        say_other_splits(config)

    def documents(name: str) -> Iterator[str]:
        if held_out and name == EVAL:
            yield from held_out.read()
            return
        part_of = split.training_part if name == TRAIN else split.held_out_part
        for i, text in enumerate(main.read()):
            part = part_of(i, text)
            if part is not None:
                yield part

    selections = {"data": dataclasses.replace(main.selection, held_out=split.held_out)}
    if held_out:
        selections["held-out data"] = held_out.selection
    return Source(split.fingerprint, documents, selections)


def _open_files(input_files: Files) -> Documents:
    def read() -> Iterator[str]:
        for p in input_files.paths:
            yield read_text(p)

    selection = dataclasses.replace(input_files.selection, documents=len(input_files.paths))
    return Documents(
        len(input_files.paths),
        files.digest(*input_files.checksums),
        read,
        selection,
        lambda i: input_files.paths[i].name,
    )


def _open_text(config: DataConfig, path: str, split: str) -> Documents:
    """Each file is a document, or several with data.separator between them."""
    input_files = find_files(
        path, (".txt", ".md", ".text"), keep_duplicates=config.duplicates == "keep"
    )
    pages = [p for p in input_files.paths if begins_as_html(p)]
    if pages:
        cli.say(
            f"{counted(len(pages), 'file')} in {path} hold a web page, such as {pages[0].name}: "
            "its tags are learned as text; take the text out first if you do not want that"
        )
    whole = _open_files(input_files)
    separator = config.separator
    if not separator:
        return whole
    counts: list[int] = []  # documents of each file
    blank: list[str] = []
    for i, text in enumerate(whole.read()):
        parts = [bool(part.strip()) for part in _split_text(text, separator)]
        counts.append(sum(parts))
        blank += [f"{whole.name(i)} part {k}" for k, full in enumerate(parts, 1) if not full]
    count = sum(counts)
    if path == config.path and count + len(blank) == whole.count:
        raise UserError(
            f"data.separator = {separator!r} stands nowhere in data.path = {path!r} "
            f"({counted(whole.count, 'file')}): correct it or leave it out"
        )

    def read() -> Iterator[str]:
        for text in whole.read():
            for part in _split_text(text, separator):
                if part.strip():
                    yield part

    def name(i: int) -> str:
        begins = [0, *itertools.accumulate(counts)]
        file = bisect.bisect_right(begins, i) - 1
        return f"{whole.name(file)} document {i - begins[file] + 1}"

    selection = whole.selection.without("blank between separators", blank)
    selection = dataclasses.replace(selection, documents=count)
    fingerprint = files.digest(whole.fingerprint, separator)
    return Documents(count, fingerprint, read, selection, name)


def _split_text(text: str, separator: str) -> Iterator[str]:
    """The texts between separators; the line end right after one belongs to it."""
    first, *others = text.split(separator)
    yield first
    for part in others:
        yield part.removeprefix("\r\n").removeprefix("\n") if part[:1] in "\r\n" else part


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
    return Documents(
        records.count, fingerprint, read, records.selection, lambda i: f"record {i + 1}"
    )


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
