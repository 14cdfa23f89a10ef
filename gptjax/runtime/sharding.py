"""How arrays are split over the mesh: the table of parameter paths, and host arrays made global.

To split a new parameter, add a row to `RULES`. The mesh axes are data (replicas that split the
batch), fsdp (batch and parameters), tensor (heads, MLP, vocabulary) and context (sequence).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.core import tree
from gptjax.core.types import Batch

AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"), "context")  # of arrays [B, T]


# Parameters of blocks have the layer as axis 0. Of each matrix, one axis is split over `tensor`:
# the one that leaves each head or hidden unit on one device. The other is split over `fsdp`.
# Vectors are small, and not split over `fsdp`.
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
    (r"blocks/.*/(rows|row_scale|lora_[a-z]+)", P()),
    (r"embed/(rows|row_scale|prompt)|head/(rows|row_scale)|score/kernel", P()),
    (r".*/(scale|bias)", P()),
)


def spec_of(path: str) -> P:
    """Mesh axes of a parameter, or of a moment of it in the optimizer's state (its path ends in the
    parameter's). Raises ValueError for a parameter that no row of `RULES` matches.
    """
    for start in ("embed/", "head/", "blocks/", "final_norm/", "score/"):
        if (at := f"/{path}".rfind(f"/{start}")) >= 0:
            return tree.first_match(RULES, path[at:])
    return P()  # counters, keys


def shardings(mesh: Mesh, shapes: Any) -> Any:
    """NamedSharding for each leaf of a TrainState or parameter tree."""
    return tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path) if leaf.ndim else P()), shapes
    )


def with_shardings(mesh: Mesh, shapes: Any) -> Any:
    """Shapes (`jax.ShapeDtypeStruct`) of a TrainState or parameter tree, with their shardings."""
    return jax.tree.map(
        lambda shape, sharding: shape.update(sharding=sharding), shapes, shardings(mesh, shapes)
    )


def shardings_of(shapes: Any) -> Any:
    """The sharding of each leaf of `with_shardings`."""
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def with_batch_sharding(mesh: Mesh, shapes: Batch) -> Batch:
    """Shapes (`jax.ShapeDtypeStruct`) of a batch's arrays, with their sharding."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda shape: shape.update(sharding=sharding), shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of the arrays [B, T] of a batch."""
    return NamedSharding(mesh, BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that are on this process's devices, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()
    rows: set[int] = set()
    for index in indices:
        if index is not None:
            rows.update(range(*index[0].indices(batch_size)))
    return sorted(rows)


def to_global(mesh: Mesh, batch: Batch) -> Batch:
    """This process's rows as part of arrays over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, of which every process has a complete copy, as arrays over all devices."""

    def place_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_array, tree, shardings)
