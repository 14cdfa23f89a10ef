"""What a run shows on the terminal: a progress bar, or plain lines where stderr is no terminal.

Names of values are `group/name` (train, eval, answers, perf, mem).
"""

from __future__ import annotations

import math
import time
from typing import Any

from gptjax.core import cli, streams

# Groups of scores: of the complete held-out split, and of the answers written to a part of it.
SCORE_GROUPS = ("eval/", "answers/")


def display_name(name: str) -> str:
    """A score's name for people: `answers/bleu` is `answers: bleu`."""
    return name.removeprefix("eval/").replace("answers/", "answers: ")


class Progress:
    """A bar with loss, tokens/s and ETA on a terminal; elsewhere a line at each `show`."""

    def __init__(self, *, start: int, steps: int) -> None:
        """start: steps done before. steps: the last step of the run."""
        self.steps = steps
        self._start = start
        self._start_time = time.monotonic()
        self._bar: Any = None
        if streams.stderr_is_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=steps, completed=start, text="")
            self._bar.start()

    def begin(self) -> None:
        """Starts the clock of the ETA: compilation is over."""
        self._start_time = time.monotonic()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Loss (or reward), learning rate, speed and ETA, from the values of `StepMetrics`."""
        if "train/reward" in values:
            parts = [f"reward {values['train/reward']:.3f}"]
        else:
            parts = [f"loss {values['train/loss']:.4f}"]
        parts.append(f"lr {values['train/lr']:.2e}")
        if "perf/tokens_per_sec" in values:
            parts.append(f"{values['perf/tokens_per_sec']:,.0f} tokens/s")
        elapsed = time.monotonic() - self._start_time
        eta = elapsed / max(step - self._start, 1) * (self.steps - step)
        parts.append(f"ETA {duration(eta)}")
        text = "  ".join(parts)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            cli.say(f"step {step}/{self.steps}  {text}")

    def note(self, step: int, text: str) -> None:
        """A line that stays, such as an evaluation."""
        if self._bar:
            self._bar.console.print(f"step {step}: {text}", highlight=False)
        else:
            cli.say(f"step {step}: {text}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `12 s`; `?` for a number that is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {remainder:02d} s" if minutes else f"{remainder} s"
