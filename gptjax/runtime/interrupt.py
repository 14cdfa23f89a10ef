"""TODO docstring."""

from __future__ import annotations

import signal
from types import FrameType

from gptjax.core.cli import say


class Stop:
    """SIGTERM and Ctrl-C ask the loop to save and end; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self.grace = False  # before the loop there is nothing to save: end at once
        import jax

        self._many = jax.process_count() > 1
        if not self._many:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.grace:
            raise KeyboardInterrupt
        self.asked = True
        say(f"{signal.Signals(number).name}: saving after this step; once more to stop without")

    def now(self, step: int) -> bool:
        """Whether to stop after `step`. Over many processes they agree: JAX catches the signal and announces a common step."""
        if not self._many:
            return self.asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
