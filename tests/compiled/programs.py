"""Training steps compiled for TPUs and GPUs that are not there, and what must hold of each."""

import dataclasses
import importlib.util
import math

import pytest

from gptjax.config import build
from gptjax.planning import communication, compile, described, targets
from gptjax.planning.forecast import config_without_data, forecast, rates_of, shapes_of

COMPILERS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda12_plugin", "cuda")}

LLAMA = dict(
    positions="rope",
    norm="rmsnorm",
    mlp="swiglu",
    bias="none",
    kv_heads=8,
    tie_embeddings=False,
    dtype="bfloat16",
    scan_layers=True,
    remat="full",
)
LLAMA_8B = LLAMA | dict(
    layers=32, width=4096, heads=32, mlp_dim=14336, context=8192, vocab_size=128256, rope_theta=5e5
)
LLAMA_70B = LLAMA_8B | dict(layers=80, width=8192, heads=64, mlp_dim=28672)
# Of the widths that the compilers' kernels and layouts are made for, and quick.
SMALL = LLAMA | dict(
    layers=2, width=1024, heads=8, kv_heads=4, mlp_dim=4096, context=2048, vocab_size=32000
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of training: on which devices, of which config."""

    target: str
    config: str = ""  # a file of configs/
    model: dict | None = None  # or the settings of a model
    overrides: dict = dataclasses.field(default_factory=dict)  # {"section.setting": value}

    def settings(self):
        if self.config:
            settings = build.load_file(f"configs/{self.config}.py")
        else:
            settings = build.load_file("configs/base.py")
            settings.model.update(self.model)
        build.override(settings, {key: str(value) for key, value in self.overrides.items()})
        return settings


@dataclasses.dataclass(frozen=True)
class Compiled:
    report: compile.CompiledReport
    least: dict  # {axes: bytes that a device must send}
    least_moved: float  # bytes of the complete arrays in which it sends them
    parts: set  # elements of each weight, or of one layer's, on a device


def compiled(step):
    """Compiles a step; skips the test where its compiler is not installed."""
    target = targets.parse(step.target)
    module, extra = COMPILERS[target.device.platform]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the extra {extra}")
    described.prepare(target)
    config = config_without_data(step.settings())
    shapes = shapes_of(config)
    plan = forecast(config, shapes, target, rates_of(config, target, 0.4, None))
    report = compile.compile_for(config, target)
    parts = {
        leaf.local_size(plan.sizes) // (config.model.layers if "blocks/" in leaf.path else 1)
        for leaf in shapes.params
    }
    least = communication.by_axes(plan.transfers)
    moved = sum(_whole(transfer, plan.sizes) for transfer in plan.transfers)
    return Compiled(report, least, moved, parts)


def _whole(transfer, sizes):
    """Bytes of the array that a ring of devices gathers, scatters or sums."""
    devices = math.prod(sizes[axis] for axis in transfer.axes)
    rounds = 2 if "once a step" in transfer.what else 1  # summed: scattered, then gathered
    return transfer.sent * devices / (devices - 1) / rounds


def faults(step, *, most=1.05):
    """What is wrong with the program of a step, a line each.

    most: bytes sent, as a multiple of the least that the mesh needs. libtpu writes a gather or a
    scatter over 64 chips, and a scatter over two dimensions of a torus, as a sum over all its
    dimensions at once: the same arrays, sent twice.
    """
    program = compiled(step)
    report, least = program.report, program.least
    if not report.fits:
        return [f"does not fit by {report.missing / 2**30:.2f} GiB: {report.refusal}"]
    lines = []
    if report.barriers:
        lines.append(f"{report.barriers} optimization barriers, as forms of CPUs have them")
    if not (report.kernels.forward and report.kernels.backward):
        lines.append(f"no flash attention forward and backward: {report.kernels}")
    sent, needed = sum(report.sent().values()), sum(least.values())
    if sent > most * needed:
        lines.append(f"sends {sent:,.0f} bytes, {sent / needed:.3f}x the least: {report.sent()}")
    moved = sum(report.moved().values())
    if moved > 1.05 * program.least_moved:
        lines.append(f"arrays of {moved:,.0f} bytes, {moved / program.least_moved:.3f}x the least")
    for one in report.traffic:
        if "data" in one.axes and one.loops:
            lines.append(f"over data in a loop, {one.count} times: {one.source or one.name}")
        if one.kind == "all-gather" and one.axes == ("fsdp",) and "s32" not in one.dtypes:
            gathered = {math.prod(map(int, shape[5:-1].split(","))) for shape in one.shapes}
            if gathered - program.parts:
                lines.append(f"gathers what is no weight: {one.shapes} {one.source}")
        if not one.exact:
            lines.append(f"in a loop of unknown length: {one.source or one.name}")
    return lines
