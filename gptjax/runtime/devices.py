"""What is known of each device, and of the machine's own: platform, peak FLOP/s, memory, links.

To add a device, add a row to `DEVICES`.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys

import jax

GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device. Rates are those of the data sheets: what a program reaches is less.

    None where no source states a number, or none could, as for a CPU.
    """

    name: str  # as in a target: v5e in v5e-16
    platform: str  # cpu, gpu, tpu
    kinds: tuple[str, ...]  # how `jax.Device.device_kind` begins
    memory: float  # bytes, as sold
    usable: float  # bytes that a program can have
    bandwidth: float | None  # bytes/s of its memory
    peak: float | None  # FLOP/s of dense products in bfloat16
    peak_float32: float | None  # FLOP/s of float32 products, as JAX computes them by default
    link: float | None  # bytes/s sent to devices of its slice or node, all links together
    network: float | None  # bytes/s sent to other slices or nodes
    node: int  # devices of a machine; 0 where all of a slice are on the same links
    price: float | None  # USD an hour, on demand
    source: str

    def usable_of(self, count: int) -> float:
        """Bytes that a program can have on each of `count` devices; those of a processor, of which
        there may be several, share its memory."""
        return self.usable / count if self.platform == "cpu" else self.usable


# How the numbers of a row were made of what its sources state. Collectives are counted by the bytes
# that a device sends, so links stated for both directions together are halved.
_CLOUD_TPU = "docs.cloud.google.com/tpu/docs"
_TPU = (
    "usable: as libtpu 0.0.50.1 says when it refuses a program; links: half of both directions; "
    "float32: rounded to bfloat16 by default; price: list price of cloud.google.com/tpu/pricing "
    "as others quote it; read 2026-11-28"
)
_GPU = (
    "usable: 92 %, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 (JAX takes 75 % by default); links: "
    "half of both directions; float32: TF32 where the chip has it; read 2026-11-28"
)
_MODAL = "modal.com, as techbytes.app quotes it on 2026-05-07"

DEVICES: tuple[Device, ...] = (
    Device(
        name="v4",
        platform="tpu",
        kinds=("TPU v4",),
        memory=32 * GIBIBYTE,
        usable=30.5 * GIBIBYTE,
        bandwidth=1.2e12,
        peak=275e12,
        peak_float32=275e12,
        link=300e9,
        network=None,
        node=0,
        price=3.22,
        source=f"{_CLOUD_TPU}/v4; "
        f"links: six of 50 GB/s, Jouppi et al. 2023 (arXiv 2304.01433); {_TPU}",
    ),
    Device(
        name="v5e",
        platform="tpu",
        kinds=("TPU v5 lite", "TPU v5e"),
        memory=16e9,
        usable=15.75 * GIBIBYTE,
        bandwidth=819e9,
        peak=197e12,
        peak_float32=197e12,
        link=200e9,
        network=3.125e9,
        node=0,
        price=1.20,
        source=f"{_CLOUD_TPU}/v5e (network: 2 x 100 Gbps a host of 8 chips); {_TPU}",
    ),
    Device(
        name="v5p",
        platform="tpu",
        kinds=("TPU v5", "TPU v5p"),
        memory=95 * GIBIBYTE,
        usable=95.73 * GIBIBYTE,
        bandwidth=2.765e12,
        peak=459e12,
        peak_float32=459e12,
        link=600e9,
        network=6.25e9,
        node=0,
        price=4.20,
        source=f"{_CLOUD_TPU}/v5p (network: 50 Gbps a chip); {_TPU}",
    ),
    Device(
        name="v6e",
        platform="tpu",
        kinds=("TPU v6 lite", "TPU v6e"),
        memory=32e9,
        usable=31.24 * GIBIBYTE,
        bandwidth=1.64e12,
        peak=918e12,
        peak_float32=918e12,
        link=400e9,
        network=12.5e9,
        node=0,
        price=2.70,
        source=f"{_CLOUD_TPU}/v6e (network: 4 x 200 Gbps a host of 8 chips); {_TPU}",
    ),
    Device(
        name="h200",
        platform="gpu",
        kinds=("NVIDIA H200",),
        memory=141e9,
        usable=0.92 * 141e9,
        bandwidth=4.8e12,
        peak=989e12,
        peak_float32=494e12,
        link=450e9,
        network=50e9,
        node=8,
        price=None,
        source=f"H200 SXM data sheet; network: 400 Gbps a GPU as in a DGX H200; {_GPU}",
    ),
    Device(
        name="h100",
        platform="gpu",
        kinds=("NVIDIA H100",),
        memory=80 * GIBIBYTE,
        usable=0.92 * 80 * GIBIBYTE,
        bandwidth=3.35e12,
        peak=989e12,
        peak_float32=494e12,
        link=450e9,
        network=50e9,
        node=8,
        price=3.00,
        source=f"H100 SXM data sheet; network: 400 Gbps a GPU as in a DGX H100; price: "
        f"24 USD a node of 8, README of karpathy/nanochat, 2026-01; {_GPU}",
    ),
    Device(
        name="a100",
        platform="gpu",
        kinds=("NVIDIA A100",),
        memory=80 * GIBIBYTE,
        usable=0.92 * 80 * GIBIBYTE,
        bandwidth=2.039e12,
        peak=312e12,
        peak_float32=156e12,
        link=300e9,
        network=25e9,
        node=8,
        price=2.50,
        source=f"A100 80GB SXM data sheet; network: 200 Gbps a GPU as in a DGX A100; price: "
        f"{_MODAL}; {_GPU}",
    ),
    Device(
        name="a100-40gb",
        platform="gpu",
        kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        memory=40 * GIBIBYTE,
        usable=0.92 * 40 * GIBIBYTE,
        bandwidth=1.555e12,
        peak=312e12,
        peak_float32=156e12,
        link=300e9,
        network=25e9,
        node=8,
        price=None,
        source=f"A100 40GB SXM data sheet; network: 200 Gbps a GPU as in a DGX A100; {_GPU}",
    ),
    Device(
        name="l4",
        platform="gpu",
        kinds=("NVIDIA L4",),
        memory=24e9,
        usable=0.92 * 24e9,
        bandwidth=300e9,
        peak=121e12,
        peak_float32=60e12,
        link=32e9,
        network=None,
        node=8,
        price=0.80,
        source=f"L4 data sheet, half of its rates with sparsity; links: PCIe 4.0 x16; "
        f"price: {_MODAL}; {_GPU}",
    ),
    Device(
        name="t4",
        platform="gpu",
        kinds=("Tesla T4",),
        memory=16e9,
        usable=0.92 * 16e9,
        bandwidth=320e9,
        peak=65e12,
        peak_float32=8.1e12,
        link=16e9,
        network=None,
        node=4,
        price=0.59,
        source=f"T4 data sheet (float16: it has no bfloat16); links: PCIe 3.0 x16; "
        f"price: {_MODAL}; {_GPU}",
    ),
    Device(
        name="v100",
        platform="gpu",
        kinds=("Tesla V100",),
        memory=16e9,
        usable=0.92 * 16e9,
        bandwidth=900e9,
        peak=125e12,
        peak_float32=15.7e12,
        link=150e9,
        network=None,
        node=8,
        price=None,
        source=f"V100 SXM2 16GB data sheet (float16: it has no bfloat16); {_GPU}",
    ),
)


def default_platform() -> str:
    """`cpu`, `gpu` or `tpu`: where JAX runs what names no device. The only place that asks JAX.

    The first call starts JAX's backend, so call it inside functions and never while importing.
    """
    return jax.default_backend()


def platform_of(mesh: jax.sharding.Mesh | None) -> str:
    """That of a mesh's devices; of no mesh, `default_platform`."""
    return str(mesh.devices.flat[0].platform) if mesh else default_platform()


def describe(device: jax.Device) -> Device | None:
    """The row of a device, present or described; None for an unknown kind."""
    if device.platform == "cpu":
        return cpu()
    rows = {kind: row for row in DEVICES for kind in row.kinds}
    kinds = [kind for kind in rows if device.device_kind.startswith(kind)]
    return rows[max(kinds, key=len)] if kinds else None


def cpu() -> Device:
    """This machine's processor as one device. Its rates are not known: they can be measured."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        name="cpu",
        platform="cpu",
        kinds=(),
        memory=memory,
        usable=0.9 * memory,
        bandwidth=None,
        peak=None,
        peak_float32=None,
        link=None,
        network=None,
        node=1,
        price=None,
        source="this machine; usable: 90 % of its memory",
    )


def usable_bytes(mesh: jax.sharding.Mesh) -> float | None:
    """Bytes that a program can have on each device of a mesh; None for an unknown kind."""
    row = describe(mesh.devices.flat[0])
    return row.usable_of(mesh.size) if row else None


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device, or None for an unknown one: then no MFU is printed."""
    row = describe(device)
    return row.peak if row else None


def memory() -> dict[str, float]:
    """{"mem/peak_gib": GiB}: peak of the first local device if its backend tells, else of the
    process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"mem/peak_gib": peak / 2**30}
