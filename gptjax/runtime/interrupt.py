"""Signals that end a run after it has saved."""

from __future__ import annotations

import signal
from types import FrameType

import jax

from gptjax.core.cli import say


class Stop:
    """SIGTERM and Ctrl-C ask the loop to save and end; a second one ends the process at once.

    grace: False before the loop starts, when there is nothing to save, so that the first signal
    ends the process already.
    """

    def __init__(self) -> None:
        self.requested = False
        self.grace = False
        self._several_processes = jax.process_count() > 1
        if not self._several_processes:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.grace:
            raise KeyboardInterrupt
        self.requested = True
        say(f"{signal.Signals(number).name}: saving after this step; once more to stop without")

    def now(self, step: int) -> bool:
        """Whether to stop after `step`.

        Several processes agree on it: JAX catches the signal and announces a common step.
        """
        if not self._several_processes:
            return self.requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
