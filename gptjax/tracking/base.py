"""What all trackers share: the interface, what a tracker is told about the run, and its run id."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gptjax.core import files


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker records.

    workdir: its folder. start: steps done before, 0 for a new run. config: {section: {setting:
    value}} of JSON types.
    """

    workdir: Path
    start: int
    config: dict[str, dict[str, Any]]

    @property
    def flat_config(self) -> dict[str, Any]:
        """{"section.setting": value}."""
        flat = {}
        for section, values in self.config.items():
            for name, value in values.items():
                flat[f"{section}.{name}"] = value
        return flat


class Tracker(Protocol):
    """Where records of metrics go. Any method may raise or take long: a run does not wait for it.

    All are called in one thread, which is not the main one.
    """

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records values by name (`group/name`) at this step."""

    def close(self) -> None:
        """Writes out what is left. Nothing is logged afterwards."""


def stored_run_id(folder: Path, create: Callable[[], str]) -> str:
    """The id in `folder/run_id`, or a created one, written there.

    A resumed run finds it and continues the same run of the service.
    """
    path = folder / "run_id"
    stored = path.read_text(encoding="utf-8", errors="replace") if os.path.isfile(path) else ""
    if run_id := stored.strip():
        if run_id.isprintable() and "\ufffd" not in run_id:
            return run_id
        files.set_aside(path, "holds no run id")
    run_id = create()
    files.write_text(path, run_id + "\n")
    return run_id
