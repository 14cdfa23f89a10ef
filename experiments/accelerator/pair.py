"""The two processes that take turns on a device, gptjax's and PyTorch's."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import turns

NO_TORCH = "PyTorch and transformers are not installed here"


class Contenders:
    """The processes that take turns in a part: `python SCRIPT --worker JSON`.

    share: of the device's memory, that each may take at most; one that wants more fails alone.
    left_out: {contender: why}, of those that did not start or have died.
    """

    def __init__(self, script: str, shares: dict[str, float]) -> None:
        self._script, self._shares = script, shares
        self._running: dict[str, turns.Contender] = {}
        self.left_out: dict[str, str] = {}

    def start(self, name: str, order: dict[str, Any]) -> None:
        env = dict(os.environ, XLA_PYTHON_CLIENT_MEM_FRACTION=str(self._shares[name]))
        order = {"contender": name, "share": self._shares[name], **order}
        command = [sys.executable, self._script, "--worker", json.dumps(order)]
        process = self._running[name] = turns.Contender(command, env)
        try:
            process.wait_until_ready()
        except turns.ContenderError as error:
            self._give_up(name, error)

    @property
    def names(self) -> list[str]:
        """Of those that run."""
        return list(self._running)

    def ask(self, name: str, request: Any) -> Any:
        """The answer; None if the contender has died of the request."""
        try:
            return self._running[name].ask(request)
        except turns.ContenderError as error:
            self._give_up(name, error)
            return None

    def _give_up(self, name: str, error: turns.ContenderError) -> None:
        self.left_out[name] = str(error)
        self._running.pop(name).close()

    def close(self) -> None:
        for process in self._running.values():
            process.close()


def torch_device(order: dict[str, Any]) -> str:
    """Where PyTorch computes, with the order's share of memory. Raises SystemExit without a GPU."""
    import torch

    if not torch.cuda.is_available():
        if order["rehearse"]:
            return "cpu"
        raise SystemExit("PyTorch sees no GPU")
    torch.cuda.set_per_process_memory_fraction(order["share"])
    torch.set_float32_matmul_precision("high")
    return "cuda"
