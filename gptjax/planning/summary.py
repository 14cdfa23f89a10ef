"""A forecast and its advice as rows to print, and as JSON.

To add a number, add a row to one of the functions below.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.planning.advice import Advice
from gptjax.planning.cost import OPTIMAL_TOKENS, Cost
from gptjax.planning.explain import Number
from gptjax.planning.forecast import Forecast
from gptjax.runtime.devices import GIBIBYTE
from gptjax.training import auto
from gptjax.training.memory import FORWARD, RECOMPUTED


def rows(plan: Forecast) -> list[Number]:
    """What the plan says, from the model to the money."""
    return [
        *_of_model(plan),
        *_of_choice(plan),
        *_of_memory(plan),
        *_of_traffic(plan),
        *_of_time(plan),
    ]


def _of_model(plan: Forecast) -> list[Number]:
    config = plan.config
    tokens = config.train.steps * plan.cost.tokens_of_step
    ratio = tokens / plan.parameters
    optimal = OPTIMAL_TOKENS * plan.parameters
    return [
        _integer("parameters", plan.parameters, "without the padding of the vocabulary"),
        Number(
            "FLOPs per token",
            plan.flops_per_token,
            f"{plan.flops_per_token:.3g}",
            "6 x parameters that multiply + 12 x layers x heads x head width x context",
        ),
        Number(
            "FLOPs per step",
            plan.cost.flops_of_step,
            f"{plan.cost.flops_of_step:.3g}",
            f"of {plan.cost.tokens_of_step:,} tokens",
        ),
        Number(
            "FLOPs of the run",
            plan.cost.flops_of_step * config.train.steps,
            f"{plan.cost.flops_of_step * config.train.steps:.3g}",
            f"train.steps = {config.train.steps:,}",
        ),
        Number(
            "tokens per parameter",
            ratio,
            f"{ratio:.1f}",
            f"{tokens:.3g} tokens; {OPTIMAL_TOKENS} are compute-optimal ({optimal:.3g} tokens: "
            "Hoffmann et al. 2022), more make a better model of its size",
        ),
    ]


def _of_choice(plan: Forecast) -> list[Number]:
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.sizes.items() if n > 1) or "one device"
    remat, choice = plan.choice.remat, plan.choice
    again = RECOMPUTED[remat].flops * FORWARD
    return [
        Number(
            "devices", plan.target.count, f"{plan.target.count:,}", f"{plan.target.name}: {mesh}"
        ),
        _integer(
            "micro-batches",
            choice.micro_batches,
            f"of {plan.work.rows:,} rows of {plan.work.length:,} tokens on a device"
            + (" (auto)" if not plan.config.train.grad_accum_steps else ""),
        ),
        Number(
            "computed again",
            again,
            f"{again:.0%}",
            f"of a step's FLOPs, by model.remat = {remat}"
            + (" (auto)" if plan.config.model.remat == "auto" else ""),
        ),
    ]


_PARTS = {
    "parameters": "float32, split as they are over the mesh",
    "optimizer": "what the optimizer keeps",
    "gradients": "float32 sums, and those of the micro-batch at work",
    "activations": "kept for the backward pass, and of the block at work",
    "loss": "logits, the output table and its gradient",
    "weights": "copies in the compute dtype, gathered layers",
}


def _of_memory(plan: Forecast) -> list[Number]:
    parts = dataclasses.asdict(plan.memory)
    memory = [
        _gibibytes(f"memory: {name}", size, _PARTS[name]) for name, size in parts.items() if size
    ]
    left = plan.usable - plan.memory.total
    said = "it fits" if left >= 0 else f"{-left / GIBIBYTE:,.2f} GiB too much"
    if plan.usable > plan.memory.total > auto.ROOM * plan.usable:
        said += ", narrowly: ask the compiler with --compile"
    return [
        *memory,
        _gibibytes(
            "memory of a device",
            plan.memory.total,
            f"of {plan.usable / GIBIBYTE:,.2f} GiB that a program can have: {said}",
        ),
    ]


def _of_traffic(plan: Forecast) -> list[Number]:
    rows = [
        _gibibytes(
            f"sent over {' and '.join(transfer.axes)}",
            transfer.sent,
            f"{transfer.what}, by each device in a step",
        )
        for transfer in plan.transfers
    ]
    cost = plan.cost
    if not rows:
        return rows
    arithmetic = f"arithmetic takes {_time(cost.arithmetic)} at MFU {cost.mfu:.0%}"
    if cost.links is None:
        return rows
    return [
        *rows,
        Number(
            "time of the links",
            cost.links,
            _time(cost.links),
            f"at their full rate; {arithmetic}: bound by {cost.bound}",
        ),
    ]


def _of_time(plan: Forecast) -> list[Number]:
    cost = plan.cost
    per_second = cost.tokens_per_second
    rows = [
        Number("time of a step", cost.step_seconds, _time(cost.step_seconds), _reason(cost)),
        Number(
            "tokens per second",
            per_second,
            f"{per_second:,.0f}",
            f"{per_second / cost.devices:,.0f} a device",
        ),
        Number(
            "time to finish",
            cost.seconds,
            _time(cost.seconds),
            "of steps alone, without evaluation and compilation",
        ),
        Number("device hours", cost.device_hours, f"{cost.device_hours:,.1f}", "devices x hours"),
    ]
    if cost.usd is not None:
        price = f"at {cost.price:.2f} USD an hour and device; --price states another"
        rows.append(Number("cost", cost.usd, f"{cost.usd:,.2f} USD", price))
    return rows


def _reason(cost: Cost) -> str:
    if cost.bound == "links":
        return f"of the links: MFU is {cost.arithmetic / cost.step_seconds * cost.mfu:.0%} at most"
    uncounted = ", links not counted" if cost.links is None and cost.devices > 1 else ""
    return f"MFU {cost.mfu:.0%}{uncounted}"


def _integer(name: str, value: int, reason: str) -> Number:
    return Number(name, value, f"{value:,}", reason)


def _gibibytes(name: str, size: float, reason: str) -> Number:
    return Number(name, size, f"{size / GIBIBYTE:,.2f} GiB", reason)


# unit, its seconds, and up to how many seconds it is used
_UNITS = (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800))


def _time(seconds: float) -> str:
    """In the unit that suits: 310 ms, 12.5 s, 43 min, 5.2 h, 3.9 days."""
    for unit, size, limit in _UNITS:
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def advice_lines(plan: Forecast, advice: Advice) -> list[str]:
    """What to do, in sentences with flags."""
    lines = []
    if not plan.fits:
        over = (plan.memory.total - plan.usable) / GIBIBYTE
        lines.append(f"It does not fit: {over:,.2f} GiB too much on each device.")
        for flags in advice.fitting:
            lines.append(f"  it fits with  {' '.join(flags)}")
        if advice.larger:
            lines.append(
                f"  nothing fits on {plan.target.name}; --target={advice.larger} is enough"
            )
        elif not advice.fitting:
            lines.append("  nothing fits on such devices, however many")
    lines.append(
        f"Largest micro-batch that fits with remat {plan.choice.remat} on this mesh, rows of a "
        f"device: {advice.largest_rows:,}."
    )
    if advice.best is not None:
        suggested = " ".join(advice.best.flags) or "as it is"
        lines.append(
            f"Suggested: {suggested}  ({advice.best.held / GIBIBYTE:,.2f} GiB, about "
            f"{_time(advice.best.seconds)} a step)"
        )
    return lines


def to_json(plan: Forecast, advice: Advice) -> dict[str, Any]:
    """All of it for machines: bytes, seconds, USD."""
    best = advice.best
    return {
        "target": {
            "name": plan.target.name,
            "device": dataclasses.asdict(plan.target.device),
            "count": plan.target.count,
            "hosts": plan.target.hosts,
            "topology": plan.target.topology,
        },
        "mesh": dict(plan.sizes),
        "choice": plan.choice._asdict(),
        "memory": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
        "usable": plan.usable,
        "fits": plan.fits,
        "traffic": [dataclasses.asdict(transfer) for transfer in plan.transfers],
        "cost": {
            **dataclasses.asdict(plan.cost),
            "bound": plan.cost.bound,
            "step_seconds": plan.cost.step_seconds,
            "tokens_per_second": plan.cost.tokens_per_second,
            "seconds": plan.cost.seconds,
            "device_hours": plan.cost.device_hours,
            "usd": plan.cost.usd,
        },
        "numbers": [dataclasses.asdict(number) for number in rows(plan)],
        "advice": {
            "fitting": [list(flags) for flags in advice.fitting],
            "larger": list(advice.larger),
            "largest_rows": advice.largest_rows,
            "suggested": list(best.flags) if best else None,
        },
    }
