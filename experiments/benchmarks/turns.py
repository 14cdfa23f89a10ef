"""Contenders that take turns: each is a process of its own, and A B C A B C ... lets all see the
same noise of a shared machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def work(step: Callable[[], None], aside: Callable[[], Any]) -> None:
    """A contender's side: answers each line `n` on stdin with the seconds of a step, over n steps,
    and with what `aside()` measures after them."""
    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = (time.perf_counter() - began) / int(line)
        print(json.dumps([seconds, aside()]), flush=True)


def measure(
    commands: dict[str, list[str]], rounds: int, seconds: float
) -> dict[str, list[tuple[float, Any]]]:
    """{contender: (seconds a step, aside) of each round}; those that do not start are named and
    left out. seconds: the length of a turn."""
    processes = {}
    for name, command in commands.items():
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while (line := process.stdout.readline()) and line.strip() != "ready":
            continue
        if line:
            processes[name] = process
        else:
            print(
                f"{name} did not start: {process.stderr.read().strip().splitlines()[-1:]}",
                file=sys.stderr,
            )

    def ask(name: str, count: int) -> tuple[float, Any]:
        processes[name].stdin.write(f"{count}\n")
        processes[name].stdin.flush()
        return tuple(json.loads(processes[name].stdout.readline()))

    counts = {name: max(1, round(seconds / ask(name, 1)[0])) for name in processes}
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name in processes:
            found[name].append(ask(name, counts[name]))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found
