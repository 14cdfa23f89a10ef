"""What a run costs: FLOPs, time and money, at a stated share of the devices' peak.

MFU is the share of the peak that the model's own FLOPs take; FLOPs that the backward pass computes
again do not count (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax.config.errors import UserError
from gptjax.planning.targets import Target

ASSUMED_MFU = 0.4  # where none is stated or measured
OPTIMAL_TOKENS = 20  # a parameter: Hoffmann et al. 2022


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a run. arithmetic: seconds of a step at that MFU; links: of its traffic at the full rate
    of the links, None where that is not known; the larger is the time of a step."""

    flops_of_step: float
    mfu: float
    arithmetic: float
    links: float | None
    steps: int
    tokens_of_step: int
    price: float | None  # USD an hour and device
    devices: int

    @property
    def bound(self) -> str:
        """What takes longer: "links" or "arithmetic"."""
        return "links" if (self.links or 0.0) > self.arithmetic else "arithmetic"

    @property
    def step_seconds(self) -> float:
        return max(self.arithmetic, self.links or 0.0)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_of_step / self.step_seconds

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds

    @property
    def device_hours(self) -> float:
        return self.devices * self.seconds / 3600

    @property
    def usd(self) -> float | None:
        return None if self.price is None else self.price * self.device_hours


def cost(
    *,
    flops_per_token: float,
    tokens_of_step: int,
    steps: int,
    target: Target,
    rate: float,
    mfu: float = ASSUMED_MFU,
    links: float | None = None,
    price: float | None = None,
) -> Cost:
    """rate: peak FLOP/s of one device; links: seconds of a step's traffic; price: in place of that
    of the table of devices."""
    flops = flops_per_token * tokens_of_step
    return Cost(
        flops_of_step=flops,
        mfu=mfu,
        arithmetic=flops / (rate * mfu * target.count),
        links=links,
        steps=steps,
        tokens_of_step=tokens_of_step,
        price=price,
        devices=target.count,
    )


def measured_rate(dtype: str, seconds: float = 0.4) -> float:
    """FLOP/s of a large product on this machine's first device: the best of some tries."""
    size = 2048
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best, end = 0.0, time.monotonic() + seconds
    while not best or time.monotonic() < end:
        start = time.monotonic()
        jax.block_until_ready(product(a, a))
        best = max(best, 2 * size**3 / (time.monotonic() - start))
    return best


def read_mfu(text: str) -> float:
    """`--mfu`: a number, or a workdir whose run has measured one (the median of its lines).

    Raises UserError for anything else.
    """
    try:
        mfu = float(text)
    except ValueError:
        mfu = _measured_mfu(Path(text))
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={text}: must be above 0 and at most 1, such as 0.4, or a workdir")
    return mfu


def _measured_mfu(workdir: Path) -> float:
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"--mfu={workdir}: neither a number such as 0.4 nor a workdir with a metrics.jsonl"
        )
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values.append(float(json.loads(line)["perf/mfu"]))
        except (ValueError, KeyError, TypeError):
            continue  # another kind of line, or a torn one
    if not values:
        raise UserError(f"--mfu={workdir}: its metrics.jsonl has no perf/mfu; give a number")
    return statistics.median(values)
