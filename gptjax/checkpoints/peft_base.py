"""The parameters of a base under their names in Hugging Face, and others in their place.

PEFT names modules and tensors as transformers does; `Base` finds the parameter of each, gives its
numbers, and turns changed tensors into whole parameters of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.peft_config import Module
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.core.types import Params
from gptjax.model import init as model_init

Tensors = dict[str, np.ndarray]


class _Place(NamedTuple):
    """Where a tensor stands: in which parameter, of which layer, as which part."""

    tensor_map: TensorMap
    layer: int | None
    part: int


class Base:
    """A base by the names of its tensors.

    read: gives its parameters; called once, and only if a number is asked for. A tied base has a
    head's name too, of the table of embeddings; a classifier has none.
    """

    def __init__(self, config: ModelConfig, read: Callable[[], Params]):
        self.config = config
        self._read = read
        self._flat: dict[str, np.ndarray] = {}
        self._in_out = huggingface.family_of(config).kernels_in_out
        self._places: dict[str, _Place] = {}
        self._maps: dict[str, TensorMap] = {}
        maps = huggingface.family_of(config).tensor_maps(
            dataclasses.replace(config, tie_embeddings=False, labels=())
        )
        for tensor_map in maps:
            if tensor_map.param_path == "head/kernel" and config.labels:
                continue
            self._maps[tensor_map.param_path] = tensor_map
            for layer in range(config.layers) if tensor_map.in_blocks else [None]:
                for part, name in enumerate(tensor_map.hf_names):
                    self._places[name.format(layer)] = _Place(tensor_map, layer, part)

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._places.keys()

    @property
    def is_tied(self) -> bool:
        """Whether the head is the table of embeddings."""
        return self.config.tie_embeddings and not self.config.labels

    @property
    def table_names(self) -> tuple[str, str]:
        """The names of the tables of embeddings and of the head."""
        return self._maps["embed/tokens"].hf_names[0], self._maps["head/kernel"].hf_names[0]

    def in_blocks(self, name: str) -> bool:
        """Whether every layer has such a tensor."""
        return self._places[name].layer is not None

    def modules(self) -> Iterator[Module]:
        """The modules that can have an adapter."""
        for name, place in self._places.items():
            path, module = place.tensor_map.param_path, name.removesuffix(".weight")
            if path.startswith("embed/"):
                yield Module(module, is_linear=False, is_input=path == "embed/tokens")
            elif path.endswith("/kernel"):
                yield Module(module, is_output=path == "head/kernel")

    def _param(self, path: str) -> np.ndarray:
        """A parameter in float32; of a tied head, the table of embeddings."""
        self._flat = self._flat or tree.flatten(self._read())
        if path == "head/kernel" and path not in self._flat:
            path = "embed/tokens"
        return np.asarray(self._flat[path], np.float32)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as it is in Hugging Face's files."""
        place = self._places[name]
        param = self._param(place.tensor_map.param_path)
        param = param if place.layer is None else param[place.layer]
        return np.asarray(place.tensor_map.to_hf(self.config, param)[place.part])

    def is_in_out(self, module: str) -> bool:
        """Whether the files hold a linear module's kernel as [in, out]."""
        return self._in_out and self.in_blocks(f"{module}.weight")

    def kernel(self, module: str) -> np.ndarray:
        """The kernel [out, in] of a linear module."""
        stored = self.tensor(f"{module}.weight")
        return stored.T if self.is_in_out(module) else stored

    def replace(self, changes: Mapping[str, np.ndarray]) -> tuple[Tensors, bool]:
        """({path: parameter with the changed tensors in it}, whether a tied head is now its own).

        changes: {name: tensor of the same shape}.
        """
        changes, untied = dict(changes), False
        if self.is_tied and any(name in changes for name in self.table_names):
            embed, head = (changes.get(n, self.tensor(n)) for n in self.table_names)
            untied = not np.array_equal(embed, head)
            changes[self.table_names[1]] = head
            if not untied:
                del changes[self.table_names[1]]
        shapes = model_init.kernel_shapes(self.config)
        parts: dict[tuple[str, int | None], dict[int, np.ndarray]] = {}
        for name, array in changes.items():
            place = self._places[name]
            parts.setdefault((place.tensor_map.param_path, place.layer), {})[place.part] = array
        replaced: Tensors = {}
        for (path, layer), by_part in parts.items():
            if path not in replaced:
                replaced[path] = self._param(path).copy()
            param = replaced[path] if layer is None else replaced[path][layer]
            tensors = list(self._maps[path].to_hf(self.config, param))
            for part, array in by_part.items():
                tensors[part] = array
            joined = self._maps[path].from_hf(self.config, shapes.get(path, ()), *tensors)
            param[: len(joined)] = joined  # a table's padding stays
        return replaced, untied
