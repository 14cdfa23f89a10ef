"""The mesh, the table of parameter paths to mesh axes, and host arrays made global.

To split a new parameter, add a row to RULES. Axes: data (replicas), fsdp (batch and parameters), tensor (heads, MLP, vocabulary),
context (sequence).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import tree
from gptjax.config import Config, UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"), "context")

# Blocks carry the layer axis first. Of each matrix, one axis is split over `tensor` (the one that keeps heads or hidden units
# whole) and the other over `fsdp`; vectors are small and stay whole over fsdp.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/tokens|head/kernel", P(("tensor", "fsdp"), None)),
    (r"embed/positions", P(None, "fsdp")),
    (r"blocks/attn/qkv/kernel", P(None, "fsdp", "tensor", None, None)),
    (r"blocks/attn/qkv/bias", P(None, "tensor", None, None)),
    (r"blocks/attn/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks/mlp/up/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/mlp/up/bias", P(None, "tensor")),
    (r"blocks/mlp/gate_up/kernel", P(None, "fsdp", None, "tensor")),
    (r"blocks/mlp/gate_up/bias", P(None, None, "tensor")),
    (r"blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"blocks/.*/(rows|row_scale|lora_[a-z]+)|embed/(rows|row_scale|prompt)|head/(rows|row_scale)|score/kernel", P()),
    (r".*/(scale|bias)", P()),
)


def start_distributed(wanted: bool) -> None:
    """Joins the other processes, before any device is touched: from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where
    they are set (`launch/local.sh`), else, when `wanted`, from what the cluster tells JAX (Cloud TPU, SLURM under srun, Open MPI)."""
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers too ({error})") from None
        jax.distributed.initialize(address, count, number)
    elif wanted:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: no cluster found ({(str(error) or repr(error)).splitlines()[0]}); under SLURM start with srun, else set JAX_COORDINATOR_ADDRESS"
            ) from None


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`, with -1 filled in. Raises UserError when it fits neither the devices nor the model."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = int(np.prod([n for n in sizes.values() if n > 0]))
    shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    count = len(devices)
    for axis, n in sizes.items():
        if n == -1:
            if count % fixed:
                raise UserError(
                    f"mesh {shown}: {count} devices are not a multiple of {fixed}, so mesh.{axis} = -1 cannot take what is left; make the fixed axes divide {count}"
                )
            sizes[axis] = count // fixed
    if (total := int(np.prod(list(sizes.values())))) != count:
        raise UserError(
            f"mesh {shown} needs {total} devices and there are {count}; set one axis to -1, or on a CPU XLA_FLAGS=--xla_force_host_platform_device_count={total}"
        )
    if faults := mesh_faults(config, sizes):
        raise UserError("\n".join(faults[:6]))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_faults(config: Config, sizes: dict[str, int]) -> list[str]:
    """What the mesh does not divide, named before anything is compiled."""
    m, rows = config.model, config.train.batch_size // config.train.accumulate
    data, fsdp, tensor = sizes["data"], sizes["fsdp"], sizes["tensor"]
    micro = f"train.batch_size / train.accumulate = {rows}"
    checks = (
        (rows, data * fsdp, micro, f"mesh.data x mesh.fsdp = {data * fsdp}"),
        (m.kv, tensor, f"model.kv_heads = {m.kv}", f"mesh.tensor = {tensor}"),
        (m.mlp_width, tensor, f"model.hidden = {m.mlp_width}", f"mesh.tensor = {tensor}"),
        (m.width, fsdp, f"model.width = {m.width}", f"mesh.fsdp = {fsdp}"),
        (
            m.padded_vocab,
            tensor * fsdp,
            f"the padded vocabulary of {m.padded_vocab} (model.vocab_multiple = {m.vocab_multiple})",
            f"mesh.tensor x mesh.fsdp = {tensor * fsdp}",
        ),
    )
    return [f"{axes} does not divide {what}: change one of them" for value, by, what, axes in checks if value % by]


def spec_of(path: str) -> P:
    """Mesh axes of a parameter, or of the optimizer's moment of it (whose path ends in the parameter's)."""
    for start in ("embed/", "head/", "blocks/", "final_norm/", "score/"):
        if (at := f"/{path}".rfind(f"/{start}")) >= 0:
            return tree.first_match(RULES, path[at:])
    return P()  # counters, keys


def shardings(mesh: Mesh, shapes: Any) -> Any:
    """NamedSharding for each leaf of a TrainState or parameter tree."""
    return tree.map_with_path(lambda path, leaf: NamedSharding(mesh, spec_of(path) if leaf.ndim else P()), shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that this process holds."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()
    return sorted({row for index in indices if index is not None for row in range(*index[0].indices(batch_size))})


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as part of arrays over all devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays that every process holds whole, as arrays over all devices."""
    one = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.tree.map(one, tree, shardings)
