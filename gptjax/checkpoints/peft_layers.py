"""Our layers as PEFT's modules: their names, and the B of each module as rows of ours.

Our layers hold q, k, v (and gate, up) in one kernel; PEFT has an A and a B for each of these
modules. The maps of a family (`tensor_map.py`) know which outputs of a kernel are which module's.
They see B [r, out] as a kernel with r inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.mapping import Shape
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.schema import ModelConfig
from gptjax.model import init as model_init
from gptjax.model import quantize

WEIGHTS = "adapter_model.safetensors"

# Begins the names of all tensors.
PREFIX = "base_model.model."

SCORE = f"{PREFIX}score.weight"


class Layer(NamedTuple):
    """One of our layers that can have an adapter, in each block.

    path: of the layer, such as `blocks/attn/qkv`. tensor_map: of its kernel. in_shape, out_shape:
    the kernel's axes.
    """

    path: str
    tensor_map: TensorMap
    in_shape: Shape
    out_shape: Shape

    def modules(self, number: int) -> list[str]:
        """Names of PEFT's modules in block `number`, without the prefix."""
        return [n.format(number).removesuffix(".weight") for n in self.tensor_map.hf_names]


def layers(config: ModelConfig) -> Iterator[Layer]:
    """The layers of a block, in the order of its family's maps."""
    shapes = model_init.kernel_shapes(config)
    for tensor_map in huggingface.family_of(config).tensor_maps(config):
        path, _, leaf = tensor_map.param_path.rpartition("/")
        if tensor_map.in_blocks and leaf == "kernel":
            shape, inputs = shapes[tensor_map.param_path], quantize.input_axes(path)
            yield Layer(path, tensor_map, shape[:inputs], shape[inputs:])


def split_outputs(config: ModelConfig, layer: Layer, b: np.ndarray) -> list[np.ndarray]:
    """The B [out, r] of each module, of our lora_b [r, *out_shape] of one block."""
    in_shape = (len(b), *[1] * (len(layer.in_shape) - 1))
    parts = layer.tensor_map.to_hf(config, b.reshape(*in_shape, *layer.out_shape))
    in_out = huggingface.family_of(config).kernels_in_out
    return [np.ascontiguousarray(part.T if in_out else part) for part in parts]


def join_outputs(config: ModelConfig, layer: Layer, parts: list[np.ndarray]) -> np.ndarray:
    """lora_b [r, *out_shape] of the modules' B [out, r]: what `split_outputs` takes apart."""
    rank = parts[0].shape[1]
    in_out = huggingface.family_of(config).kernels_in_out
    tensors = [part.T if in_out else part for part in parts]
    shape = (rank, *[1] * (len(layer.in_shape) - 1), *layer.out_shape)
    return layer.tensor_map.from_hf(config, shape, *tensors).reshape(rank, *layer.out_shape)


class ModuleAdapter(NamedTuple):
    """PEFT's adapter of one module. a [r, in]; b [out, r], scaled; magnitude [out] with DoRA."""

    number: int  # of the module among those of our layer
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


def join_modules(
    config: ModelConfig, layer: Layer, modules: list[ModuleAdapter], sizes: list[int]
) -> dict[str, np.ndarray]:
    """lora_a and lora_b of one layer in one block; {} where no module has an adapter.

    sizes: outputs of every module, also of those without an adapter.
    """
    if not modules:
        return {}

    def outputs(with_b: list[ModuleAdapter]) -> np.ndarray:
        """lora_b with the rows of these modules, and zeros elsewhere."""
        rank = with_b[0].b.shape[1]
        parts = [np.zeros((size, rank), np.float32) for size in sizes]
        for module in with_b:
            parts[module.number] = module.b
        return join_outputs(config, layer, parts)

    first = modules[0].a
    if all(np.array_equal(module.a, first) for module in modules):
        a, lora_b = first, outputs(modules)
    else:  # block-diagonal: each module's rows use its own A
        a = np.concatenate([module.a for module in modules])
        lora_b = np.concatenate([outputs([module]) for module in modules])
    return {"lora_a": np.ascontiguousarray(a.T).reshape(*layer.in_shape, -1), "lora_b": lora_b}


def pad_rank(layer: Layer, adapter: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The adapter of one block, or none, with zeros up to a common rank."""
    a = adapter.get("lora_a", np.zeros((*layer.in_shape, 0), np.float32))
    b = adapter.get("lora_b", np.zeros((0, *layer.out_shape), np.float32))
    missing = rank - len(b)
    return {
        "lora_a": np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]),
        "lora_b": np.pad(b, [(0, missing)] + [(0, 0)] * (b.ndim - 1)),
    }
