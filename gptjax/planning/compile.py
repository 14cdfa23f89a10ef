"""What the target's own compiler says of a training step: whether it fits, memory, traffic.

In: a `TrainPlan` whose mesh is of the target's devices (`described.devices`). Out: a
`CompiledReport`, which `format_report` prints and `as_json` writes.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from gptjax.config.schema import Config
from gptjax.planning import described, program
from gptjax.planning.collectives import Collective, collectives
from gptjax.planning.communication import sum_by_axes
from gptjax.planning.targets import Target
from gptjax.runtime.devices import GIBIBYTE
from gptjax.runtime.mesh import make_mesh
from gptjax.training import step
from gptjax.training.setup import TrainPlan, make_plan

Traffic = Mapping[tuple[str, ...], float]  # {axes: bytes that a device sends over them in a step}
NOTHING: Traffic = {}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Names of the attention kernels in the program; none where attention is XLA's own code."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """What a compiler made of a step. memory and what follows: None and empty where it refused."""

    target: str
    usable: float  # bytes of a device that a program can have
    lower_seconds: float  # tracing and lowering
    compile_seconds: float
    barriers: int  # optimization barriers in what was handed to the compiler
    refusal: str = ""  # the compiler's words
    missing: float = 0.0  # bytes that a device lacks
    memory: Memory | None = None
    traffic: tuple[Collective, ...] = ()
    kernels: Kernels = Kernels((), ())
    hlo: str = dataclasses.field(default="", repr=False)  # the compiled program

    @property
    def fits(self) -> bool:
        return not self.missing and not self.refusal

    def sent(self) -> dict[tuple[str, ...], float]:
        """{axes: bytes that a device sends over them in a step}."""
        return sum_by_axes((one.axes, one.sent) for one in self.traffic)

    def moved(self) -> dict[tuple[str, ...], float]:
        """{axes: bytes of the complete arrays of their collectives in a step}."""
        return sum_by_axes((one.axes, one.total) for one in self.traffic)


def compile_for(config: Config, target: Target) -> CompiledReport:
    """The report of the training step of a config whose zeros are filled in.

    Raises UserError where the compiler is missing, or the mesh of the config fits no such devices.
    """
    return report(make_plan(config, make_mesh(config, described.devices(target))), target)


def report(plan: TrainPlan, target: Target) -> CompiledReport:
    """Lowers and compiles the training step for the devices of the plan's mesh.

    XLA:GPU and XLA:CPU compile what does not fit; their programs are compared with the device.
    """
    usable = target.device.usable_of(target.count)
    begin = time.perf_counter()
    lowered = step.lower(plan)
    lower_seconds = time.perf_counter() - begin
    barriers = lowered.as_text().count("stablehlo.optimization_barrier")
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not _is_out_of_memory(str(error)):
            raise
        return CompiledReport(
            target=target.name,
            usable=usable,
            lower_seconds=lower_seconds,
            compile_seconds=time.perf_counter() - begin,
            barriers=barriers,
            refusal=_sentence(str(error)),
            missing=_missing(str(error)),
        )
    seconds = time.perf_counter() - begin
    memory, hlo = _memory(compiled), compiled.as_text() or ""
    return CompiledReport(
        target=target.name,
        usable=usable,
        lower_seconds=lower_seconds,
        compile_seconds=seconds,
        barriers=barriers,
        missing=max(memory.peak - usable, 0.0),
        memory=memory,
        traffic=tuple(collectives(hlo, plan.mesh)),
        kernels=attention_kernels(hlo),
        hlo=hlo,
    )


def attention_kernels(hlo: str) -> Kernels:
    """Flash attention among the custom calls: splash on TPUs, cuDNN's on GPUs."""
    forward: set[str] = set()
    backward: set[str] = set()
    for executed in program.parse(hlo).executed():
        instruction = executed.instruction
        if instruction.opcode != "custom-call":
            continue
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        name = target[1] if target else ""
        if name == "tpu_custom_call":
            name = re.sub(r"[.\d]+$", "", instruction.name)
            is_backward = bool(re.search(r"_d(q|kv)(_|$)", name))
            if "attention" not in name and "splash" not in name and "flash" not in name:
                continue
        elif "fmha" in name:
            is_backward = name.endswith("Backward")
        else:
            continue
        (backward if is_backward else forward).add(name)
    return Kernels(tuple(sorted(forward)), tuple(sorted(backward)))


def _memory(compiled: jax.stages.Compiled) -> Memory:
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def _is_out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message


def _sentence(message: str) -> str:
    """The part of a refusal that says how much is missing."""
    at = max(message.find("Ran out of memory"), 0)
    return re.split(r"\. |\n", message[at:], maxsplit=1)[0].strip()


def _missing(message: str) -> float:
    """Bytes by which a program exceeds the device; 0 where the message does not say."""
    if match := re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT])", message):
        return float(match[1]) * _UNITS[match[2]]
    pattern = r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
    if match := re.search(pattern, message):
        return float(match[1]) * _UNITS[match[2]] - float(match[3]) * _UNITS[match[4]]
    return 0.0


def as_json(compiled: CompiledReport, least: Traffic = NOTHING) -> dict[str, Any]:
    """The report as JSON takes it. least: {axes: bytes that the mesh needs}."""
    memory = compiled.memory
    return {
        "target": compiled.target,
        "fits": compiled.fits,
        "refusal": compiled.refusal,
        "missing_bytes": compiled.missing,
        "usable_bytes": compiled.usable,
        "lower_seconds": round(compiled.lower_seconds, 2),
        "compile_seconds": round(compiled.compile_seconds, 2),
        "optimization_barriers": compiled.barriers,
        "memory": memory and dataclasses.asdict(memory) | {"peak": memory.peak},
        "attention_kernels": dataclasses.asdict(compiled.kernels),
        "sent_bytes": {"+".join(axes): size for axes, size in compiled.sent().items()},
        "least_sent_bytes": {"+".join(axes): size for axes, size in least.items()},
        "collectives": [_collective_json(one) for one in compiled.traffic],
    }


def _collective_json(one: Collective) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "axes": one.axes,
        "dtypes": one.dtypes,
        "bytes": one.size,
        "count": one.count,
        "sent": one.sent,
        "source": one.source,
    }


def format_report(compiled: CompiledReport, least: Traffic = NOTHING) -> str:
    """Lines for people. least: {axes: bytes that the mesh needs}."""
    rows = [("compiled for", f"{compiled.target}: {_verdict(compiled)}")]
    if memory := compiled.memory:
        parts = (
            f"arguments {_gib(memory.arguments)} + outputs {_gib(memory.outputs)} - aliased "
            f"{_gib(memory.aliased)} + temporaries {_gib(memory.temporaries)}"
        )
        peak = f"{_gib(memory.peak)} of {_gib(compiled.usable)} GiB: {parts}"
        rows += [("peak memory", peak), *_traffic_rows(compiled, least)]
        kernels = compiled.kernels
        forward, backward = ", ".join(kernels.forward), ", ".join(kernels.backward)
        rows.append(("attention forward", forward or "XLA's own code, no kernel"))
        rows.append(("attention backward", backward or "XLA's own code, no kernel"))
    rows.append(("optimization barriers", str(compiled.barriers)))
    lower, compile_ = compiled.lower_seconds, compiled.compile_seconds
    rows.append(("time", f"{lower:.1f} s to trace and lower, {compile_:.1f} s to compile"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _verdict(compiled: CompiledReport) -> str:
    if compiled.fits:
        return "fits"
    lacking = f" by {_gib(compiled.missing)} GiB a device" if compiled.missing else ""
    words = f" ({compiled.refusal})" if compiled.refusal else ""
    return f"does not fit{lacking}{words}"


def _traffic_rows(compiled: CompiledReport, least: Traffic) -> list[tuple[str, str]]:
    sent = compiled.sent()
    rows = []
    for axes in [*sent, *(axes for axes in least if axes not in sent)]:
        size, needed = sent.get(axes, 0.0), least.get(axes)
        kinds = {one.kind for one in compiled.traffic if one.axes == axes}
        text = f"{_gib(size)} GiB a step and device ({', '.join(sorted(kinds)) or 'none'})"
        if needed:
            text += f"; least {_gib(needed)}: {size / needed:.2f}x"
        rows.append((f"sent over {'+'.join(axes)}", text))
    if sent:
        total, needed = sum(sent.values()), sum(least.values())
        ratio = f"; least {_gib(needed)}: {total / needed:.2f}x" if needed else ""
        rows.append(("sent in all", f"{_gib(total)} GiB a step and device{ratio}"))
        moved = sum(compiled.moved().values())
        rows.append(("arrays in all", f"{_gib(moved)} GiB a step, gathered or summed"))
    if any(not one.exact for one in compiled.traffic):
        rows.append(("", "loops that end by their data are counted as one round"))
    return rows


def _gib(size: float) -> str:
    return f"{size / GIBIBYTE:.3g}" if size < GIBIBYTE else f"{size / GIBIBYTE:,.2f}"
