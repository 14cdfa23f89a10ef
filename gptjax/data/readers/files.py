"""What readers of files share: finding the files, and reading lines that may be gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.core.files import decode
from gptjax.data.records import Record, SplitRecords


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a file name, a folder (with its folders, by suffix) or a glob, sorted.

    Raises UserError where there are none, or where one is no regular file.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        paths = [p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes)]
    elif root.exists():
        paths = [root]
    else:
        paths = _match_glob(root)
    if not paths:
        patterns = " ".join(f"*{suffix}" for suffix in suffixes)
        raise UserError(
            f"data.path = {path!r}: no file there (looking for {patterns}); "
            f"the working directory is {Path.cwd()}"
        )
    for p in paths:
        if not p.is_file():
            raise UserError(f"data.path = {path!r}: {p} is not a regular file")
    return sorted(paths)


def _match_glob(pattern: Path) -> list[Path]:
    if not any(c in str(pattern) for c in "*?["):
        return []
    anchor = Path(pattern.anchor)  # "/", or "" for a relative pattern
    relative = pattern.relative_to(anchor) if pattern.is_absolute() else pattern
    return [p for p in anchor.glob(relative.as_posix()) if p.is_file()]


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
    paths: list[Path],
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
    return SplitRecords(count, files.digest(settings, *(files.sha256(p) for p in paths)), read)
