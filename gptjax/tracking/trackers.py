"""Where a run's metrics go: `metrics.jsonl` always, and the trackers named in `train.trackers`.

To add a tracker, add its name to `TRACKERS` in `config/schema.py`, and a file of that name here
with PACKAGE (what must be importable), INSTALL (the command that installs it) and
`start(run) -> Tracker`; see `tensorboard.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.tracking import jsonl
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
    """Sends each record to metrics.jsonl and all trackers. A tracker that raises is named on
    stderr, once, and dropped: the run goes on without it. A metrics.jsonl that cannot be written
    ends the run (OSError): the summary and the report would show old numbers as the last ones.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        """names: of `train.trackers`, in addition to metrics.jsonl."""
        self._metrics = jsonl.start(run)
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = _module(name).start(run)
            except Exception as error:
                _say_dropped(name, error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records values by name (`group/name`) at this step."""
        self._metrics.log(step, values)
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, values)
            except Exception as error:
                del self._trackers[name]
                _say_dropped(name, error)

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                _say_dropped(name, error)
        self._trackers = {}
        self._metrics.close()


def _say_dropped(name: str, error: Exception) -> None:
    reason = (str(error) or repr(error)).splitlines()[0]
    cli.say(f"tracker {name}: {type(error).__name__}: {reason}; the run goes on without it")
