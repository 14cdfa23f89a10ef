"""What readers of files share: reading lines that may be gzipped, and JSON objects."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.core.files import decode
from gptjax.data.readers.finding import Files
from gptjax.data.records import Record, SplitRecords


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file that may be gzipped."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from enumerate(file, 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from None


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. where: its place for error messages."""
    try:
        value = json.loads(decode(text, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}, not an object with fields")
    return value


def records_of_files(
    found: Files,
    read: Callable[[], Iterator[Record]],
    *,
    settings: str = "",
    count: int | None = None,
) -> SplitRecords:
    """The records that `read()` gives of these files.

    settings: what else decides the records, for the fingerprint. count: number of records where
    it is known without reading them.
    """
    if count is None:
        count = sum(1 for _ in read())
    selection = dataclasses.replace(found.selection, documents=count)
    return SplitRecords(count, files.digest(settings, *found.checksums), read, selection)
