"""TODO docstring."""

from __future__ import annotations

import math
import time

import jax

from gptjax.config.errors import UserError
from gptjax.config.schema import Config


def flops_per_token(config: Config, params: int) -> float:
    """Training FLOPs per token: 6 per weight that multiplies (4 where it is frozen under adapters), plus attention 12 L H C T (Chowdhery et al.
    2022, appendix B). params: of the whole model."""
    m = config.model
    lookups = 0 if m.tie_embeddings else m.vocab_size * m.width
    lookups += m.context * m.width if m.positions == "learned" else 0
    return (4 if config.lora.on else 6) * (
        params - lookups
    ) + 12 * m.layers * m.heads * m.head_width * config.length


class StepMetrics:
    """Metrics of the steps since the last log line; still on the device until `flush`, so that steps overlap with the host (not on a CPU)."""

    def __init__(self, positions: int) -> None:
        """positions: B x T of a step, which is what it computes however many of them are learned."""
        self._positions = positions
        self._pending: list[dict[str, jax.Array]] = []
        self._since, self._waited = time.monotonic(), 0.0

    def add(self, step_metrics: dict[str, jax.Array], waited: float) -> None:
        self._pending.append(step_metrics)
        self._waited += waited

    def restart_clock(self) -> None:
        self._since, self._waited = time.monotonic(), 0.0

    def flush(self, last_step: int) -> dict[str, float]:
        """Token-weighted means and rates. Raises UserError at the first step with a non-finite loss or gradient."""
        rows = [{k: float(v) for k, v in row.items()} for row in jax.device_get(self._pending)]
        self._pending = []
        if not rows:
            return {}
        for offset, row in enumerate(rows, 1):
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                step = last_step - len(rows) + offset
                raise UserError(
                    f"step {step}: the loss is {row['loss']} and the gradient norm {row['grad_norm']}; the run stops and keeps the last checkpoint.\n"
                    "Lower optim.lr, lengthen optim.warmup_steps, or set optim.max_grad_norm = 1.0, in a new --workdir."
                )
        tokens = sum(row["tokens"] for row in rows)
        seconds = time.monotonic() - self._since
        values = {
            "train/loss": sum(row["loss"] * row["tokens"] for row in rows) / tokens,
            "train/grad_norm": rows[-1]["grad_norm"],
            "train/lr": rows[-1]["lr"],
            "perf/tokens_per_sec": self._positions * len(rows) / seconds,
            "perf/step_time": seconds / len(rows),
            "perf/data_wait": self._waited / len(rows),
        }
        values |= {
            f"train/{name}": sum(row[name] for row in rows) / len(rows)
            for name in ("reward", "answer_tokens")
            if name in rows[0]
        }
        self.restart_clock()
        return values
