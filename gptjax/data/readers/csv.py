"""Tables: commas and quotes, or in .tsv, .tab and .txt files tabs without quotes.

The first line names the fields, unless `data.columns` does. Where it has none of its separators,
it may have another: , ; or tabs.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core.files import decode
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.readers.opening import is_html, read_lines, with_compression
from gptjax.data.records import Record, SplitRecords

_LONGEST_FIELD = 1 << 30  # characters; the csv module's own limit is 131,072
_SEPARATORS = (",", ";", "\t")
_WITH_TABS = with_compression((".tsv", ".tab", ".txt"))


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Values after the fields that `data.columns` names are left out, and counted.

    Raises UserError where a line has too few fields or is not valid CSV.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    input_files = find_files(
        path, (".csv", ".tsv", ".tab"), keep_duplicates=config.duplicates == "keep"
    )

    def read(longer: list[str] | None = None) -> Iterator[Record]:
        for p in input_files.paths:
            yield from _read_file(p, list(config.columns), [] if longer is None else longer)

    longer: list[str] = []
    count = sum(1 for _ in read(longer))
    input_files = dataclasses.replace(
        input_files, selection=input_files.selection.without("rows' further values", longer)
    )
    return records_of_files(input_files, read, settings=json.dumps(config.columns), count=count)


def _read_file(path: Path, columns: list[str], longer: list[str]) -> Iterator[Record]:
    """longer: gets the places of rows with values after those that `columns` names."""
    separator = _separator(path, len(columns) or 2)
    quoted = not path.name.lower().endswith(_WITH_TABS)
    reader = csv.reader(
        _read_text(path),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names = columns
    problems = {}
    start = 1  # line where a row begins; it ends in `reader.line_num`
    try:
        for values in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not values:
                continue
            if not names:
                names = [name.strip() for name in values]
                problems = {
                    name: f"is the name of {count} columns in line {reader.line_num}"
                    for name, count in Counter(names).items()
                    if count > 1
                }
                continue
            too_many = len(values) > len(names) and not columns
            if too_many or len(values) < len(names):
                raise UserError(_ragged(where, values, names, separator, quoted))
            if len(values) > len(names):
                longer.append(where)
            fields = dict(zip(names, values, strict=False))
            for name in problems:
                del fields[name]
            yield Record(where, fields, problems)
    except csv.Error as error:
        raise UserError(f"{_place(path, start, reader.line_num)}: {_reason(error)}") from None


def _read_text(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if b"\0" in line:
            raise UserError(f"{path}:{number} holds a zero byte, which no text has")
        if number == 1 and is_html(line):
            raise UserError(f"{path} is a web page and not a table: was its download refused?")
        yield decode(line, f"{path}:{number}")


def _separator(path: Path, fields: int) -> str:
    """The one that the file's suffix means, or else one that gives the first line its fields."""
    usual = "\t" if path.name.lower().endswith(_WITH_TABS) else ","
    first_line = next(_read_text(path), "")
    for separator in (usual, *_SEPARATORS):
        try:
            values = next(csv.reader([first_line], delimiter=separator), [])
        except csv.Error:
            continue
        if len(values) >= fields:
            return separator
    return usual


def _ragged(
    where: str, values: Sequence[str], names: Sequence[str], separator: str, quoted: bool
) -> str:
    hint = ""
    if len(values) > len(names) and quoted:
        hint = f"; text with {'commas' if separator == ',' else repr(separator)} stands in quotes"
    return (
        f"{where} has {len(values)} fields and there are {len(names)} columns: "
        f"{', '.join(names)}{hint}"
    )


def _place(path: Path, start: int, end: int) -> str:
    return f"{path}:{start}" if end <= start else f"{path}:{start}, in a row up to line {end}"


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return 'a quote is opened and never closed; within quotes, write " as ""'
    if "expected after" in text:
        return 'there is text behind a closing quote; within quotes, write " as ""'
    if "new-line character" in text:
        return "lines end in \\r alone; convert them, such as with tr '\\r' '\\n'"
    return f"it is not valid CSV: {text}"
