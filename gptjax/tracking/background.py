"""A tracker in a thread of its own, so that it can neither block nor slow nor end a run.

Records wait in a bounded queue. A tracker that raises, that leaves too many waiting, or that does
not end in time is set aside and named once, with what is lost.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from gptjax.core import cli, files
from gptjax.tracking.base import Tracker

MOST_WAITING = 10_000  # records; one has a few hundred bytes
# That the end of a run waits for all of its trackers together: MLflow takes half a minute to make
# its database on a busy machine, and a scheduler's grace period is short.
CLOSE_SECONDS, STOPPED_SECONDS = 120.0, 10.0
_SILENT_SECONDS, _POLL_SECONDS = 5.0, 0.2  # after which a wait is said, and the limit asked again


class BackgroundTracker:
    """Sends records to a tracker, which is started, used and closed in one thread."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        """name: as in messages."""
        self._name, self._start = name, start
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._set_aside = False
        self._step = 0  # that the thread is at
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hands a record over. Never waits."""
        self._put((step, values))

    def end(self) -> None:
        """Says that nothing more is logged. Never waits."""
        self._put(None)

    def join(self, seconds_left: Callable[[], float]) -> None:
        """Waits for what is left to be written, until no seconds are left."""
        began, is_said = time.monotonic(), False
        while self._thread.is_alive() and (left := seconds_left()) > 0:
            self._thread.join(min(left, _POLL_SECONDS))
            if not is_said and time.monotonic() - began > _SILENT_SECONDS:
                cli.say(f"{self._name}: waiting for it, {left:.0f} s at most")
                is_said = True
        if self._thread.is_alive():
            self._give_up("it does not end")

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        if self._set_aside:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"{MOST_WAITING:,} records wait for it")

    def _give_up(self, why: str) -> None:
        if self._set_aside:
            return
        self._set_aside = True
        self._thread.name = f"{cli.GIVEN_UP}{self._name}"  # the process's end does not wait for it
        lost = f"records of step {self._step} on are lost" if self._step else "it has no records"
        cli.say(f"{self._name}: {why}; the run goes on without it ({lost})")

    def _work(self) -> None:
        tracker = None
        try:
            tracker = self._start()
            while (item := self._queue.get()) and not self._set_aside:
                self._step = item[0]
                tracker.log(*item)
            tracker.close()
        except BaseException as error:  # a library may even call sys.exit
            self._give_up(f"{type(error).__name__}: {files.reason(error)}")
            with contextlib.suppress(BaseException):
                if tracker:
                    tracker.close()
