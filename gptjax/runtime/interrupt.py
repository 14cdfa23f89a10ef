"""Signals that end a run after it has saved."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax

from gptjax.core.cli import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop while it did what changes no parameter: an evaluation, a wait."""


class Stop:
    """SIGTERM, SIGHUP and Ctrl-C ask the loop to save and end; a second one ends the process at
    once. Signals that the process was started to ignore (nohup) stay ignored.

    grace: False before the loop starts, when there is nothing to save, so that the first signal
    ends the process already.
    """

    def __init__(self) -> None:
        self.requested = False
        self.grace = False
        self._raises = False
        self._polls = 0
        self._several_processes = jax.process_count() > 1
        for number in (signal.SIGHUP,) if self._several_processes else SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._forward if self._several_processes else self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        ends, self.requested = self.requested or not self.grace, True
        # What is raised while Python runs a callback of its own is lost: `requested` stays.
        if ends:
            raise KeyboardInterrupt
        say(f"{signal.Signals(number).name}: saving; once more to stop without")
        if self._raises:
            raise Interrupted

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Of several processes JAX catches SIGTERM itself."""
        os.kill(os.getpid(), signal.SIGTERM)

    def now(self) -> bool:
        """Whether to stop. Several processes agree on it, so all must ask equally often: JAX
        catches the signal and announces a common count.
        """
        if not self._several_processes:
            return self.requested
        from jax.experimental import multihost_utils

        self._polls += 1
        return multihost_utils.reached_preemption_sync_point(self._polls)

    def poll(self) -> None:
        """Raises Interrupted where the run is to stop."""
        if self.now():
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal to the only process raises Interrupted at once.

        For work that may be given up anywhere: nothing is half written, no state is half changed.
        Where the process is to stop already, it is not begun.
        """
        if self.requested:
            raise Interrupted
        self._raises = True
        try:
            yield
        finally:
            self._raises = False
