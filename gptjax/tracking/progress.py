"""What a run tells while it goes: `metrics.jsonl` always, TensorBoard where it is installed, a progress bar or plain lines.

Every record has `step` and `time`; names are `group/name` (train, eval, perf, mem). Rates count from the first step after compilation.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from gptjax.core import cli

SCORE_GROUPS = (
    "eval/",
    "answers/",
)  # names of scores: over the whole held-out split, and of the answers written to some of it


def display_name(name: str) -> str:
    """The name of a score as people read it."""
    return name.removeprefix("eval/").replace("answers/", "answers: ")


class Progress:
    """A bar with loss, tokens/s and ETA on a terminal; elsewhere a line whenever `show` is called."""

    def __init__(self, *, start: int, steps: int):
        self.steps, self._start, self._began = steps, start, time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=steps, completed=start, text="")
            self._bar.start()

    def begin(self) -> None:
        """The clock of the ETA starts: compilation is over."""
        self._began = time.monotonic()

    def show(self, step: int, values: dict[str, float]) -> None:
        done, elapsed = step - self._start, time.monotonic() - self._began
        eta = elapsed / max(done, 1) * (self.steps - step)
        parts = (
            [f"reward {values['train/reward']:.3f}"]
            if "train/reward" in values
            else [f"loss {values['train/loss']:.4f}"]
        )
        parts += [f"lr {values['train/lr']:.2e}"]
        if "perf/tokens_per_sec" in values:
            parts.append(f"{values['perf/tokens_per_sec']:,.0f} tokens/s")
        parts.append(f"ETA {duration(eta)}")
        self._say(step, "  ".join(parts))

    def note(self, step: int, text: str) -> None:
        """A line that stays, such as an evaluation."""
        if self._bar:
            self._bar.console.print(f"step {step}: {text}", highlight=False)
        else:
            cli.say(f"step {step}: {text}")

    def _say(self, step: int, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            cli.say(f"step {step}/{self.steps}  {text}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
