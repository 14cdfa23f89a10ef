"""`metrics.jsonl` in the workdir: one JSON object a line, always with `step` and `time` (Unix
seconds). It is always on: the report is made from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from gptjax.core import cli, files
from gptjax.tracking.base import TrackedRun

FILE = "metrics.jsonl"
_MOST_WAITING = 100_000  # records kept in memory while they cannot be written


class JsonlTracker:
    """Appends records to the file. A resumed run drops the records past its start first.

    Records that cannot be written, as on a full disk, wait in memory and are tried again with each
    that follows.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._path = run.workdir / FILE
        self._waiting: list[tuple[int, bytes]] = []  # (step, line)
        self._has_failed = False
        _keep_until(self._path, run.start)

    def log(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **as_json(values)}
        self._waiting.append((step, json.dumps(record).encode() + b"\n"))
        del self._waiting[:-_MOST_WAITING]
        self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()
        if self._waiting:
            first, last = self._waiting[0][0], self._waiting[-1][0]
            cli.say(f"warning: {self._path}: the records of steps {first} to {last} are lost")
        elif self._has_failed:
            cli.say(f"{self._path}: all records are written after all")

    def _write(self) -> None:
        try:
            _append(self._path, b"".join(line for _, line in self._waiting))
            self._waiting = []
        except OSError as error:
            if not self._has_failed:
                cli.say(
                    f"warning: {self._path}: {files.reason(error)}; the run goes on, and the "
                    f"records of step {self._waiting[0][0]} on wait in memory"
                )
            self._has_failed = True


def start(run: TrackedRun) -> JsonlTracker:
    return JsonlTracker(run)


def as_json(values: dict[str, float]) -> dict[str, Any]:
    """Values as JSON can hold them: NaN and infinity become text."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for name, value in values.items()
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. Damaged lines, or all of a damaged file, are left out."""
    try:
        lines = path.read_bytes().splitlines() if os.path.isfile(path) else []
    except OSError:
        return []
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record
    return None


def _append(path: Path, data: bytes) -> None:
    """Writes all of the data at the end of the file, or none."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _keep_until(path: Path, start: int) -> None:
    """Leaves in the file the records up to step `start`.

    Damaged lines go, and what is no file; as they were, they are set aside and named.
    """
    if not os.path.isfile(path):
        if os.path.lexists(path):
            files.set_aside(path, "not a file")
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        files.set_aside(path, files.reason(error))
        return
    lines, damaged = [], 0
    for line in content.splitlines():
        record = _parse(line)
        damaged += record is None
        if record and record["step"] <= start:
            lines.append(line + b"\n")
    remaining = b"".join(lines)
    if remaining == content:
        return
    try:
        if damaged:
            _copy_aside(path, damaged)
        if content.startswith(remaining):
            os.truncate(path, len(remaining))  # which a full disk allows
        else:
            files.write_bytes(path, remaining)
    except OSError as error:
        cli.say(f"warning: {path}: lines that do not count stay in it: {files.reason(error)}")


def _copy_aside(path: Path, damaged: int) -> None:
    copy = files.place_for_damaged(path.parent, path.name)
    lines = "1 damaged line is" if damaged == 1 else f"{damaged:,} damaged lines are"
    try:
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        cli.say(f"warning: {path}: {lines} left out; the file as it was: {copy}")
    except OSError:
        cli.say(f"warning: {path}: {lines} left out")
