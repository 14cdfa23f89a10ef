"""Tables: commas and quotes, or in .tsv, .tab and .txt files tabs without quotes.

The first line names the fields, unless `data.columns` does.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core.files import decode
from gptjax.data.readers.files import read_lines, records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.records import Record, SplitRecords

_LONGEST_FIELD = 1 << 30  # characters; the csv module's own limit is 131,072


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Values after the fields that `data.columns` names are left out.

    Raises UserError where a line has too few fields or is not valid CSV.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    found = find_files(path, (".csv", ".tsv", ".tab"))

    def read() -> Iterator[Record]:
        for p in found.paths:
            yield from _read_file(p, list(config.columns))

    return records_of_files(found, read, settings=json.dumps(config.columns))


def _read_file(path: Path, columns: list[str]) -> Iterator[Record]:
    tabs = path.name.removesuffix(".gz").endswith((".tsv", ".tab", ".txt"))
    text = (decode(line, f"{path}:{number}") for number, line in read_lines(path))
    reader = csv.reader(
        text,
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    names = columns
    try:
        for values in reader:
            if not values:
                continue
            if not names:
                names = values
                continue
            where = f"{path}:{reader.line_num}"
            too_many = len(values) > len(names) and not columns
            if too_many or len(values) < len(names):
                hint = "; text with commas stands in quotes" if too_many and not tabs else ""
                raise UserError(
                    f"{where} has {len(values)} fields and there are {len(names)} columns: "
                    f"{', '.join(names)}{hint}"
                )
            yield Record(where, dict(zip(names, values, strict=False)))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is not valid CSV: {error}") from None
