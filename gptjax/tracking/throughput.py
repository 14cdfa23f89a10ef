"""Metrics of training steps between two log lines, and the FLOPs of a token.

Rates (`perf/...`) count from the first step after compilation, or from the last log line.
"""

from __future__ import annotations

import math
import time

import jax

from gptjax.config.errors import UserError
from gptjax.config.schema import Config

# Metrics that only some objectives have: plain means over the steps.
_OPTIONAL = ("reward", "answer_tokens")


def flops_per_token(config: Config, params: int) -> float:
    """Training FLOPs per token, for a model of that many parameters.

    6 for each weight that is multiplied (4 if adapters freeze it), plus 12 L H C T for attention
    (Chowdhery et al. 2022, appendix B).
    """
    m = config.model
    lookups = 0 if m.tie_embeddings else m.vocab_size * m.width
    if m.positions == "learned":
        lookups += m.context * m.width
    per_weight = 4 if config.lora.on else 6
    attention = 12 * m.layers * m.heads * m.head_width * config.length
    return per_weight * (params - lookups) + attention


class StepMetrics:
    """Metrics of the steps since the last log line.

    They stay on the device until `flush`, so that steps overlap with the host's work (on a CPU
    steps are synchronous).
    """

    def __init__(self, positions: int) -> None:
        """positions: B x T of a step. It computes all of them, however many are learned."""
        self._positions = positions
        self._pending: list[dict[str, jax.Array]] = []
        self.restart_clock()

    def add(self, step_metrics: dict[str, jax.Array], waited: float) -> None:
        """waited: seconds that this step waited for its batch."""
        self._pending.append(step_metrics)
        self._waited += waited

    def restart_clock(self) -> None:
        """Leaves out of the rates what came between steps, such as an evaluation."""
        self._since, self._waited = time.monotonic(), 0.0

    def flush(self, last_step: int) -> dict[str, float]:
        """Means weighted by tokens, and rates, of the steps up to `last_step`.

        Raises UserError at the first step whose loss or gradient is not finite.
        """
        steps = [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(self._pending)
        ]
        self._pending = []
        if not steps:
            return {}
        _check_finite(steps, last_step)
        tokens = sum(step["tokens"] for step in steps)
        seconds = time.monotonic() - self._since
        values = {
            "train/loss": sum(step["loss"] * step["tokens"] for step in steps) / tokens,
            "train/grad_norm": steps[-1]["grad_norm"],
            "train/lr": steps[-1]["lr"],
            "perf/tokens_per_sec": self._positions * len(steps) / seconds,
            "perf/step_time": seconds / len(steps),
            "perf/data_wait": self._waited / len(steps),
        }
        for name in _OPTIONAL:
            if name in steps[0]:
                values[f"train/{name}"] = sum(step[name] for step in steps) / len(steps)
        self.restart_clock()
        return values


def _check_finite(steps: list[dict[str, float]], last_step: int) -> None:
    for number, step in enumerate(steps, last_step - len(steps) + 1):
        if not (math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"])):
            raise UserError(
                f"step {number}: the loss is {step['loss']} and the gradient norm "
                f"{step['grad_norm']}; the run stops and keeps the last checkpoint.\n"
                "Lower optim.lr, lengthen optim.warmup_steps, or set optim.max_grad_norm = 1.0, "
                "in a new --workdir."
            )
