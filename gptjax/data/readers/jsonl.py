"""JSON Lines, one object a line; arrays of objects, and objects one after the other, too."""

from __future__ import annotations

from collections.abc import Iterator

from gptjax.config.schema import DataConfig
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.readers.json_objects import count_objects, read_objects
from gptjax.data.records import Record, SplitRecords


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Raises UserError where a file does not hold JSON objects."""
    input_files = find_files(
        path,
        (".jsonl", ".ndjson"),
        second_choice=(".json",),
        keep_duplicates=config.duplicates == "keep",
    )

    def read() -> Iterator[Record]:
        for p in input_files.paths:
            yield from read_objects(p)

    return records_of_files(input_files, read, count=sum(map(count_objects, input_files.paths)))
