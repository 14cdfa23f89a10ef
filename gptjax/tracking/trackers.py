"""Where a run's metrics go: `metrics.jsonl` always, and the trackers named in `train.trackers`.

To add a tracker, add its name to `TRACKERS` in `config/schema.py`, and a file of that name here
with PACKAGE (what must be importable), INSTALL (the command that installs it) and
`start(run) -> Tracker`; see `tensorboard.py`. A tracker may raise and may take its time
(`background.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tracking import background, jsonl
from gptjax.tracking.background import BackgroundTracker
from gptjax.tracking.base import TrackedRun, Tracker


def _module(name: str) -> Any:
    return importlib.import_module(f"gptjax.tracking.{name}")


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError, with the command that installs it, if a tracker's package is missing."""
    for name in names:
        module = _module(name)
        spec = importlib.util.find_spec(module.PACKAGE)
        if spec is None or spec.origin is None:  # a mere folder of that name has no origin
            raise UserError(
                f"train.trackers has {name!r}, which needs the package {module.PACKAGE}: "
                f"{module.INSTALL}, or leave it out with --config.train.trackers="
            )


class Trackers:
    """Sends each record to metrics.jsonl and all trackers, each in a thread of its own.

    One that fails or hangs is named on stderr, once, and the run goes on without it.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        """names: of `train.trackers`, in addition to metrics.jsonl."""
        self._latest: dict[frozenset[str], dict[str, Any]] = {}
        path = run.workdir / jsonl.FILE
        self._trackers = [BackgroundTracker(str(path), lambda: jsonl.start(run))]
        for name in names:
            starts = functools.partial(_start, name, run)
            self._trackers.append(BackgroundTracker(f"tracker {name}", starts))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records values by name (`group/name`) at this step. Never waits, never raises."""
        self._latest.pop(names := frozenset(values), None)
        self._latest[names] = {"step": step, **jsonl.as_json(values)}
        for tracker in self._trackers:
            tracker.log(step, values)

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The newest record of each kind, whatever became of the files: for the run's summary."""
        return list(self._latest.values())

    def close(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Waits a while for what is left to be written; a short one where the run is stopped."""
        for tracker in self._trackers:
            tracker.end()
        began = time.monotonic()

        def seconds_left() -> float:
            limit = background.STOPPED_SECONDS if is_stopped() else background.CLOSE_SECONDS
            return began + limit - time.monotonic()

        for tracker in self._trackers:
            tracker.join(seconds_left)
        self._trackers = []


def _start(name: str, run: TrackedRun) -> Tracker:
    return _module(name).start(run)
