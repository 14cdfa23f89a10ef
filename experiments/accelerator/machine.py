"""The part `machine`: versions, the device, and what it can do at best."""

from __future__ import annotations

import importlib.metadata
import platform

import contenders
import shapes
from part import Save, Settings

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def measure(settings: Settings, save: Save) -> None:
    import jax

    from gptjax.runtime.devices import peak_flops

    device = jax.devices()[0]
    versions = {"python": platform.python_version()} | {n: _version(n) for n in LIBRARIES}
    record = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax_bytes_limit": (device.memory_stats() or {}).get("bytes_limit"),
        "data_sheet_flops": peak_flops(device),
        "versions": versions,
    }
    save(record)
    size = shapes.TOY_CEILINGS if settings.rehearse else shapes.CEILINGS
    record["read_rate"] = contenders.jax_read_rate(size["read"])
    save(record)
    n = size["matrix"]
    record["matrix_rate"] = contenders.jax_matrix_rate(n, n, n, "bfloat16", at_least=20 * 2 * n**3)
    save(record)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
