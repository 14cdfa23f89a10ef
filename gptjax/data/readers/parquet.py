"""Apache Parquet files: one record a row."""

from __future__ import annotations

from collections.abc import Iterator

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.records import Record, SplitRecords


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Raises UserError where pyarrow is missing or a file is damaged."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            "data.source = 'parquet' needs pyarrow: pip install 'gptjax[parquet]'"
        ) from None
    found = find_files(path, (".parquet",), compressed=False)

    def read() -> Iterator[Record]:
        for p in found.paths:
            number = 0
            try:
                for batch in parquet.ParquetFile(p).iter_batches():
                    for fields in batch.to_pylist():
                        yield Record(f"{p} row {number}", fields)
                        number += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{p} is not a complete parquet file: {str(error).splitlines()[0][:200]}"
                ) from None

    return records_of_files(found, read)
