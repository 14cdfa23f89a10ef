"""Contenders that take turns: each is a process of its own, and A B C A B C ... lets all see the
same noise of a shared machine.

A contender says "ready" and then answers each line of JSON on its stdin with one on its stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def serve(answer: Callable[[Any], Any]) -> None:
    """A contender's side. answer: from a request to its answer, both JSON.

    What the process prints from now on goes to stderr, so that no library can garble an answer.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=out, flush=True)


def work(
    step: Callable[[], Any], aside: Callable[[], Any], *, wait: Callable[[], None] = lambda: None
) -> None:
    """A contender that answers `n` with the seconds of a step, over n steps, and with what
    `aside()` measures after them. wait: returns once all steps asked for are done."""

    def answer(count: int) -> tuple[float, Any]:
        return timed(step, count, wait), aside()

    timed(step, 2, wait)
    serve(answer)


def timed(step: Callable[[], Any], count: int, wait: Callable[[], None]) -> float:
    """Seconds of a step, over `count` of them, from an idle machine to an idle one."""
    wait()
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - began) / count


class ContenderError(Exception):
    """A contender did not start, or ended before it answered: the last line that it wrote."""


class Contender:
    """The process of a contender, seen from the side that asks."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        # a pipe might fill up; `close` closes it
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=env,
        )

    def wait_until_ready(self) -> None:
        """Raises ContenderError."""
        while (line := self._process.stdout.readline()) and line.strip() != "ready":
            continue
        if not line:
            raise ContenderError(self._last_words())

    def ask(self, request: Any) -> Any:
        """Raises ContenderError."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderError(self._last_words()) from None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise ContenderError(self._last_words())

    def close(self, *, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return lines[-1].strip() if lines else f"ended with {code} and said nothing"


def measure(
    commands: dict[str, list[str]], rounds: int, seconds: float
) -> dict[str, list[tuple[float, Any]]]:
    """{contender: (seconds a step, aside) of each round}; those that do not start are named and
    left out. seconds: the length of a turn."""
    contenders = {}
    for name, command in commands.items():
        contender = Contender(command)
        try:
            contender.wait_until_ready()
            contenders[name] = contender
        except ContenderError as error:
            contender.close()
            print(f"{name} did not start: {error}", file=sys.stderr)
    counts = {name: max(1, round(seconds / c.ask(1)[0])) for name, c in contenders.items()}
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(tuple(contender.ask(counts[name])))
    for contender in contenders.values():
        contender.close()
    return found
