"""TODO docstring."""

from __future__ import annotations

import resource
import sys

import jax

# Dense bfloat16 peak in FLOP/s: Google Cloud TPU documentation and NVIDIA data sheets (without sparsity).
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


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device, or None for an unknown one: then no MFU is printed."""
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def memory() -> dict[str, float]:
    """Peak memory in GiB: of the first device where the backend tells, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"mem/peak_gib": peak / 2**30}
