"""TODO docstring."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

from gptjax.core import files


class Tracker:
    """Appends records to `metrics.jsonl` and TensorBoard. Records past `start` (of a killed run) are dropped when a run goes on."""

    def __init__(self, workdir: Path, *, start: int):
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_jsonl(self.path) if line["step"] <= start]
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - held for the run
        self._board = None
        if importlib.util.find_spec("tensorboardX"):
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(
            json.dumps(
                {
                    k: v if not isinstance(v, float) or math.isfinite(v) else str(v)
                    for k, v in record.items()
                }
            )
            + "\n"
        )
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line that a killed process left half-written is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
