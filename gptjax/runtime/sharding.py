"""The mesh, the table of parameter paths to mesh axes, and host arrays made global.

To split a new parameter, add a row to RULES. Axes: data (replicas), fsdp (batch and parameters), tensor (heads, MLP, vocabulary),
context (sequence).
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.core import tree
from gptjax.core.types import Batch

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
    (
        r"blocks/.*/(rows|row_scale|lora_[a-z]+)|embed/(rows|row_scale|prompt)|head/(rows|row_scale)|score/kernel",
        P(),
    ),
    (r".*/(scale|bias)", P()),
)


def spec_of(path: str) -> P:
    """Mesh axes of a parameter, or of the optimizer's moment of it (whose path ends in the parameter's)."""
    for start in ("embed/", "head/", "blocks/", "final_norm/", "score/"):
        if (at := f"/{path}".rfind(f"/{start}")) >= 0:
            return tree.first_match(RULES, path[at:])
    return P()  # counters, keys


def shardings(mesh: Mesh, shapes: Any) -> Any:
    """NamedSharding for each leaf of a TrainState or parameter tree."""
    return tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path) if leaf.ndim else P()), shapes
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that this process holds."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()
    return sorted(
        {
            row
            for index in indices
            if index is not None
            for row in range(*index[0].indices(batch_size))
        }
    )


def to_global(mesh: Mesh, batch: Batch) -> Batch:
    """This process's rows as part of arrays over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays that every process holds whole, as arrays over all devices."""
    one = lambda array, sharding: jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )
    return jax.tree.map(one, tree, shardings)
