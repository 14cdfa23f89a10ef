"""How arrays are split over the mesh: the table of parameter paths, and host arrays made global.

To split a new parameter, add a row to `RULES`. The mesh axes are data (replicas that split the
batch), fsdp (batch and parameters), tensor (heads, MLP, vocabulary) and context (sequence). What
devices exchange in a step stands in `ops/collectives.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.core import tree
from gptjax.core.types import Batch, TrainState

AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"), "context")  # of arrays [B, T]
TEXTS = P("data")  # of what generation has for each text, [B, ...]
CACHE = P(("data", "tensor"))  # of keys and values, [B * K, ...]


# Parameters of blocks have the layer as axis 0. Of each matrix, one axis is split over `tensor`:
# the one that leaves each head or hidden unit on one device. The other is split over `fsdp`.
# Vectors and adapters are small, and not split over `fsdp`.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/tokens|head/kernel", P("tensor", "fsdp")),
    (r"embed/positions", P(None, "fsdp")),
    (r"blocks/attn/qkv/kernel", P(None, "fsdp", "tensor", None, None)),
    (r"blocks/attn/qkv/bias", P(None, "tensor", None, None)),
    (r"blocks/attn/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks/mlp/up/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/mlp/up/bias", P(None, "tensor")),
    (r"blocks/mlp/gate_up/kernel", P(None, "fsdp", None, "tensor")),
    (r"blocks/mlp/gate_up/bias", P(None, None, "tensor")),
    (r"blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"blocks/attn/qkv/lora_b", P(None, None, "tensor", None, None)),
    (r"blocks/attn/qkv/(lora_m|lora_length|dora_scale)", P(None, "tensor", None, None)),
    (r"blocks/attn/out/lora_a", P(None, "tensor", None, None)),
    (r"blocks/mlp/up/lora_b", P(None, None, "tensor")),
    (r"blocks/mlp/up/(lora_m|lora_length|dora_scale)", P(None, "tensor")),
    (r"blocks/mlp/gate_up/lora_b", P(None, None, None, "tensor")),
    (r"blocks/mlp/gate_up/(lora_m|lora_length|dora_scale)", P(None, None, "tensor")),
    (r"blocks/mlp/down/lora_a", P(None, "tensor", None)),
    # matrices as rows [out, in], those of gate and up apart (`model.quantize.gates_apart`)
    (r"(embed|head)/rows", P("tensor", None)),
    (r"(embed|head)/row_scale", P("tensor")),
    (r"blocks/(attn/qkv|mlp/up)/rows", P(None, "tensor", None)),
    (r"blocks/(attn/qkv|mlp/up)/row_scale", P(None, "tensor")),
    (r"blocks/mlp/gate_up/rows", P(None, None, "tensor", None)),
    (r"blocks/mlp/gate_up/row_scale", P(None, None, "tensor")),
    (r"blocks/(attn/out|mlp/down)/rows", P(None, None, "tensor")),
    (r"blocks/.*/(row_scale|dora_scale|lora_[a-z]+)", P()),
    (r"embed/prompt|score/kernel", P()),
    (r".*/(scale|bias)", P()),
)


def param_path(path: str) -> str:
    """The parameter that a path of a TrainState is about: its own, or the end of a moment's path.

    "" for counters and keys.
    """
    for start in ("embed/", "head/", "blocks/", "final_norm/", "score/"):
        if (at := f"/{path}".rfind(f"/{start}")) >= 0:
            return path[at:]
    return ""


def _spec_of(param: str) -> P:
    """By `RULES`; of a parameter of one layer, blocks/3/..., without the axis of layers.

    Raises ValueError for a parameter that no row matches.
    """
    stacked, numbers = re.subn(r"^blocks/\d+/", "blocks/", param)
    spec = tree.first_match(RULES, stacked)
    return P(*spec[1:]) if numbers else spec


def reduced_spec(
    spec: P, param: tuple[int, ...], moment: tuple[int, ...], *, first: bool = False
) -> P:
    """Mesh axes of a moment with one axis less than its parameter, such as Adafactor's.

    param, moment: shapes; spec: of the parameter. Of several axes that may be the missing one,
    the last is taken, or the `first`. A moment of any other shape, a placeholder, is replicated.
    """
    axes = [i for i in range(len(param)) if param[:i] + param[i + 1 :] == moment]
    if not axes:
        return P()
    missing = axes[0] if first else axes[-1]
    full = [*spec, *[None] * (len(param) - len(spec))]
    return P(*full[:missing], *full[missing + 1 :])


def shardings(mesh: Mesh | AbstractMesh, shapes: Any) -> Any:
    """NamedSharding for each leaf of a TrainState or parameter tree.

    A moment in the optimizer's state is split as its parameter is. Raises ValueError for a
    parameter that no row of `RULES` matches.
    """
    params = tree.flatten(shapes.params) if isinstance(shapes, TrainState) else {}

    def sharding_of(path: str, leaf: Any) -> NamedSharding:
        name = param_path(path)
        if not leaf.ndim or not name:
            return NamedSharding(mesh, P())
        spec, param = _spec_of(name), params.get(name)
        if param is not None and leaf.shape != param.shape:
            # Optax takes means over the longest axis for rows and over the second longest for
            # columns; of axes of equal length, the last counts as the longest.
            spec = reduced_spec(spec, param.shape, leaf.shape, first="/v_col/" in path)
        return NamedSharding(mesh, spec)

    return tree.map_with_path(sharding_of, shapes)


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
    sharding = NamedSharding(mesh, P(BATCH[0]))
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows: set[int] = set()
    for index in indices:
        if index is not None:
            rows.update(range(*index[0].indices(batch_size)))
    return sorted(rows)


def to_global(mesh: Mesh, batch: Batch) -> Batch:
    """This process's rows (`local_rows`), each of full length, as part of arrays over all
    devices."""
    sharding, groups = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    own_groups = len(local_rows(mesh, groups))

    def to_array(local: np.ndarray) -> jax.Array:
        shape = (len(local) // own_groups * groups, *local.shape[1:])
        rows = local_rows(mesh, shape[0])

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = rows.index(start)  # the rows of one device are neighbours
            return local[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(to_array, batch)


def on_each_device(
    mesh: Mesh, function: Callable[..., Any], *, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """The function, run by each device of the mesh on its own part of the arguments.

    What the devices exchange is in the function alone (`ops/collectives.py`). On one device it is
    the function itself.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def specs(params: Any) -> Any:
    """The PartitionSpec of each leaf of a parameter tree.

    Raises ValueError for a parameter that no row of `RULES` matches.
    """

    def spec_of(path: str, leaf: Any) -> P:
        name = param_path(path)
        return _spec_of(name) if leaf.ndim and name else P()

    return tree.map_with_path(spec_of, params)


def decoding_specs(name: str, argument: Any) -> Any:
    """The PartitionSpec of each leaf of an argument of generation's functions: parameters by
    `RULES`, what has a row for each text over `data`, caches [B * K, ...] over `tensor` too."""
    if name.endswith("params"):
        return specs(argument)

    def spec_of(path: str, leaf: Any) -> P:
        if not np.ndim(leaf) or path.endswith("eos_ids"):
            return P()
        return CACHE if "cache" in f"{name}/{path}" else TEXTS

    return tree.map_with_path(spec_of, argument)


def axes_without(spec: P) -> tuple[str, ...]:
    """The axes of the mesh along which an array of that spec has copies."""
    named = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
    return tuple(axis for axis in AXES if axis not in named)


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, of which every process has a complete copy, as arrays over all devices."""

    def place_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_array, tree, shardings)
