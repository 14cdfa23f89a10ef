"""Data sets of TensorFlow Datasets, read without TensorFlow.

`data.name` names the data set, `data.path` its data_dir, and the splits have names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core import files
from gptjax.core.files import decode
from gptjax.data.readers.finding import listed_files
from gptjax.data.records import Record, SplitRecords


def check(config: DataConfig) -> str:
    """What the config lacks, or ""."""
    if config.name:
        return ""
    return "data.name is empty and data.source = 'tfds' needs it: --config.data.name=c4/en:3.1.0"


def split_names(config: DataConfig, path: str) -> tuple[str, ...]:
    """The names of the splits. Raises UserError where there is none."""
    names = tuple(_open_builder(config, path).info.splits)
    if not names:
        raise UserError(
            f"data.name = {config.name!r} in data.path = {path!r} has no splits: is it prepared?"
        )
    return names


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """The rows of a split (see `split_names`). Raises UserError where it needs TensorFlow."""
    builder = _open_builder(config, path)
    splits = builder.info.splits
    try:
        rows = builder.as_data_source(split)
    except (NotImplementedError, OSError, ValueError) as error:
        raise UserError(
            f"data.name = {config.name!r} cannot be read without TensorFlow: "
            f"{_first_line(error)[:200]}\nPrepare it with file_format='array_record'."
        ) from None

    def read() -> Iterator[Record]:
        for i in range(len(rows)):
            where = f"{config.name} {split} row {i}"
            yield Record(where, {name: _plain(v, where) for name, v in rows[i].items()})

    input_files = listed_files(f"{config.name} {split}", [Path(p) for p in splits[split].filepaths])
    selection = dataclasses.replace(input_files.selection, documents=len(rows))
    return SplitRecords(len(rows), files.digest(*input_files.checksums), read, selection)


def _open_builder(config: DataConfig, path: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data.source = 'tfds' needs tensorflow-datasets: pip install 'gptjax[tfds]' ({error})"
        ) from None
    options = {"data_dir": str(Path(path).expanduser())} if path else {}
    try:
        return tfds.builder(config.name, **options)
    except Exception as error:  # tfds has its own errors for names, versions and folders
        raise UserError(
            f"data.name = {config.name!r} in data.path = {path!r}: {_first_line(error)[:300]}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _plain(value: Any, where: str) -> Any:
    """Bytes as text, arrays as lists, NumPy numbers as Python's."""
    if isinstance(value, bytes):
        return decode(value, where)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(part, where) for part in value] if isinstance(value, list) else value
