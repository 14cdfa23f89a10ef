"""The machine's devices: default platform, peak FLOP/s, peak memory.

To add a device, add a row to `PEAK_FLOPS`.
"""

from __future__ import annotations

import resource
import sys

import jax

# Dense bfloat16 peak in FLOP/s, without sparsity. Sources: Google Cloud TPU documentation, NVIDIA
# data sheets.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}


def default_platform() -> str:
    """`cpu`, `gpu` or `tpu`: where JAX runs what names no device. The only place that asks JAX.

    The first call starts JAX's backend, so call it inside functions and never while importing.
    """
    return jax.default_backend()


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device, or None for an unknown one: then no MFU is printed."""
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def memory() -> dict[str, float]:
    """{"mem/peak_gib": GiB}: peak of the first local device if its backend tells, else of the
    process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"mem/peak_gib": peak / 2**30}
