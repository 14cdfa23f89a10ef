"""Devices that are described rather than present: what a target's own compiler compiles for.

libtpu (extra `tpu`) knows every TPU by name; XLA:GPU (extra `cuda`) takes a description of the
card. To describe another GPU, add a row to `GPUS`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from gptjax.config.errors import UserError
from gptjax.planning.targets import Target
from gptjax.runtime.devices import Device

# libtpu looks for chips and for the cloud's description of them: it is told that there are none,
# keeps no log files, and lets other processes use it too.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA:GPU wants to know of a card beside its row of `runtime.devices`. Bytes."""

    name: str  # as the driver gives it
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    float32_units: int  # of a multiprocessor
    threads: int  # at once on a multiprocessor
    shared_memory: int  # of a multiprocessor
    shared_memory_of_block: int  # at most, on request
    clock: float  # GHz, the highest
    l2_cache: int


# Sources, read 2026-11-28. Cores, clocks, caches: NVIDIA's data sheets and the white papers
# of Ampere (A100), Hopper (H100) and Ada (L4). What goes with a compute capability: "Compute
# Capabilities" in the CUDA C++ Programming Guide. Both as openxla/xla states them for its tests
# (xla/backends/gpu/target_config/specs), where it has the card.
_AMPERE: dict[str, Any] = dict(
    capability=(8, 0),
    cores=108,
    float32_units=64,
    threads=2048,
    shared_memory=164 * 2**10,
    shared_memory_of_block=163 * 2**10,
    clock=1.41,
    l2_cache=40 * 2**20,
)
_HOPPER: dict[str, Any] = dict(
    capability=(9, 0),
    cores=132,
    float32_units=128,
    threads=2048,
    shared_memory=228 * 2**10,
    shared_memory_of_block=227 * 2**10,
    clock=1.98,
    l2_cache=50 * 2**20,
)
_ADA: dict[str, Any] = dict(
    capability=(8, 9),
    cores=58,
    float32_units=128,
    threads=1536,
    shared_memory=100 * 2**10,
    shared_memory_of_block=99 * 2**10,
    clock=2.04,
    l2_cache=48 * 2**20,
)
GPUS: dict[str, Gpu] = {
    "h200": Gpu("NVIDIA H200", **_HOPPER),
    "h100": Gpu("NVIDIA H100 80GB HBM3", **_HOPPER),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", **_AMPERE),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", **_AMPERE),
    "l4": Gpu("NVIDIA L4", **_ADA),
}


def prepare(target: Target) -> None:
    """What a compiler without its devices needs of the process. Before JAX's backend starts.

    A variable that the user has set stays.
    """
    if target.name == "here":
        return
    jax.config.update("jax_platforms", "cpu")
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if target.device.platform == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", target.count)


def devices(target: Target) -> list[jax.Device]:
    """The target's devices, to make a mesh of. Arrays cannot be put on described ones.

    Raises UserError where the compiler is not installed or knows no such devices.
    """
    platform = target.device.platform
    if target.name == "here" or platform == "cpu":
        return _present(target)
    if not target.topology:
        raise UserError(f"--target={target.name}: no compiler describes a {target.device.name}")
    if platform == "tpu":
        return _tpus(target)
    return _gpus(target)


def _present(target: Target) -> list[jax.Device]:
    present = jax.devices() if target.name == "here" else jax.devices("cpu")
    if len(present) < target.count:
        raise UserError(
            f"--target={target.name}: this process has {len(present)} devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={target.count}"
        )
    return present[: target.count]


def _tpus(target: Target) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--target={target.name} --compile needs the compiler of TPUs (no TPU): "
            "pip install 'gptjax[tpu]'"
        )
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology, **_bounds(target)
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--target={target.name}: libtpu does not describe {target.topology}: "
            f"{_first_line(error)}"
        ) from error
    return list(found.devices)


def _bounds(target: Target) -> dict[str, list[int]]:
    """A slice smaller than a host says so."""
    shape = [int(n) for n in target.topology.partition(":")[2].split("x")]
    return {"chips_per_host_bounds": [*shape, 1, 1][:3]} if target.count < 4 else {}


def _gpus(target: Target) -> list[jax.Device]:
    names = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    if not any(importlib.util.find_spec(name) for name in names):
        raise UserError(
            f"--target={target.name} --compile needs the compiler of GPUs (5.5 GB, no GPU): "
            "pip install 'gptjax[cuda]'"
        )
    if target.device.name not in GPUS:
        raise UserError(
            f"--target={target.name} --compile: XLA:GPU needs more of a {target.device.name} than "
            f"gptjax/planning/described.py has; it has {', '.join(GPUS)}"
        )
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=target.topology,
        target_config=target_config(target.device),
    )
    return list(found.devices)


def target_config(device: Device) -> str:
    """A card of `GPUS` as text of XLA's `GpuTargetConfigProto`, with CUDA 12.9 and cuDNN 9.10."""
    gpu = GPUS[device.name]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.float32_units}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {device.memory:.0f}
  memory_bandwidth: {device.bandwidth:.0f}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared_memory_of_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: {gpu.threads}
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
