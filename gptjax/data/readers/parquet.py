"""Apache Parquet files: one record a row; only the columns that are asked for are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.readers.opening import describe_other
from gptjax.data.records import Record, SplitRecords, missing_columns


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Raises UserError where pyarrow is missing or a file is damaged."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(
            "data.source = 'parquet' needs pyarrow: pip install 'gptjax[parquet]'"
        ) from None
    input_files = find_files(
        path, (".parquet",), compressed=False, keep_duplicates=config.duplicates == "keep"
    )
    count = sum(_open_file(p).metadata.num_rows for p in input_files.paths)

    def read(names: Collection[str] | None = None) -> Iterator[Record]:
        for p in input_files.paths:
            yield from _read_file(p, names)

    return dataclasses.replace(records_of_files(input_files, read, count=count), read_fields=read)


def _open_file(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from None


def _read_file(path: Path, names: Collection[str] | None) -> Iterator[Record]:
    """names: of the columns that are read; None = all."""
    import pyarrow

    file = _open_file(path)
    there = file.schema_arrow.names
    columns = [name for name in there if names is None or name in names]
    problems = missing_columns(names, there)
    number = 0
    try:
        for batch in file.iter_batches(columns=columns):
            for fields in batch.to_pylist():
                yield Record(f"{path} row {number}", fields, problems)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    known = describe_other(path)
    if known and "parquet" not in known:
        return f"{path} is not a parquet file but {known}"
    return f"{path} is not a complete parquet file: {str(error).splitlines()[0][:200]}"
