"""`metrics.jsonl` in the workdir: one JSON object a line, always with `step` and `time` (Unix
seconds). It is always on: the report and the run's summary are made from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from gptjax.core import files
from gptjax.tracking.base import TrackedRun

FILE = "metrics.jsonl"


class JsonlTracker:
    """Appends records to the file. A resumed run drops the records past its start first."""

    def __init__(self, run: TrackedRun) -> None:
        path = run.workdir / FILE
        if path.exists():
            records = [record for record in read_jsonl(path) if record["step"] <= run.start]
            files.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def log(self, step: int, values: dict[str, float]) -> None:
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            # NaN and infinity are not JSON: they become text
            is_json = not isinstance(value, float) or math.isfinite(value)
            record[name] = value if is_json else str(value)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def start(run: TrackedRun) -> JsonlTracker:
    return JsonlTracker(run)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. Damaged lines are skipped: a killed process leaves one."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records
