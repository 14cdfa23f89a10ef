"""Parameters to the tensors of a Hugging Face file and back, by the maps of a family.

The shapes of the tensors follow from those of the parameters, so every tensor of a file is
accounted for before any is read; each is read and written once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.families.common import Family
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.model.init import kernel_shapes

Shape = tuple[int, ...]


class MappedTensors(NamedTuple):
    """The tensors that hold one parameter (of one layer, or with layer None of the model)."""

    tensor_map: TensorMap
    layer: int | None
    shapes: dict[str, Shape]  # {name in the file: shape}, in the order of the map


class WritableTensor(NamedTuple):
    """A tensor to write. make: computes the array, when its turn comes."""

    name: str
    shape: Shape
    make: Callable[[], np.ndarray]


def hf_tensors(config: ModelConfig, family: Family) -> Iterator[MappedTensors]:
    """All tensors of the family's file for this model, in the file's order.

    Raises UserError where the family has no place for a parameter of the model.
    """
    shapes = kernel_shapes(config)
    maps = family.tensor_maps(config)
    if different := {m.param_path for m in maps} ^ set(shapes):
        raise UserError(f"a {family.model_type} file cannot hold {sorted(different)[:4]}")
    for tensor_map in maps:
        param = jax.ShapeDtypeStruct(shapes[tensor_map.param_path], np.float32)
        tensors = jax.eval_shape(lambda x, m=tensor_map: m.to_hf(config, x), param)
        for layer in range(config.layers) if tensor_map.in_blocks else (None,):
            names = [name.format(layer) for name in tensor_map.hf_names]
            by_name = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}
            yield MappedTensors(tensor_map, layer, by_name)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets every UserError inside name the checkpoint at `path`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def from_params(config: ModelConfig, params: Any) -> Iterator[WritableTensor]:
    """The tensors of a Hugging Face file, one by one: nothing is copied before its turn."""
    flat = tree.flatten(params)

    def make(tensor_map: TensorMap, layer: int | None, part: int) -> np.ndarray:
        leaf = flat[tensor_map.param_path]
        param = np.asarray(leaf if layer is None else leaf[layer])
        return np.ascontiguousarray(tensor_map.to_hf(config, param)[part])

    for tensor_map, layer, shapes in hf_tensors(config, huggingface.family_of(config)):
        for part, (name, shape) in enumerate(shapes.items()):
            yield WritableTensor(name, shape, functools.partial(make, tensor_map, layer, part))
