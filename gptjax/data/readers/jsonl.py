"""JSON Lines: one JSON object a line; files may be gzipped, and empty lines are passed over."""

from __future__ import annotations

from collections.abc import Iterator

from gptjax.config.schema import DataConfig
from gptjax.data.readers.files import parse_object, read_lines, records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.records import Record, SplitRecords


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Raises UserError where a line is not a JSON object."""
    found = find_files(path, (".jsonl", ".ndjson"))

    def read() -> Iterator[Record]:
        for p in found.paths:
            for number, line in read_lines(p):
                if line.strip():
                    yield Record(f"{p}:{number}", parse_object(line, f"{p}:{number}"))

    count = 0  # without parsing JSON
    for p in found.paths:
        count += sum(1 for _, line in read_lines(p) if line.strip())
    return records_of_files(found, read, count=count)
