"""How one parameter is held by tensors of a Hugging Face file: a `TensorMap`, and the usual ones.

A family (`families/`) lists one map for each parameter; `mapping.py` applies them in both
directions. A map sees the arrays of one layer at a time, and `to_hf(from_hf(x))` is x, bit for bit.
To support another layout of tensors, add a function here that returns a `TensorMap`.

Dims: D width, H query heads, K key/value heads, G = H / K, C head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.config.schema import ModelConfig

RawConfig = Mapping[str, Any]  # a config.json as it was parsed


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One parameter and the tensors that hold it in a Hugging Face file.

    param_path: path of the parameter; below `blocks/` it stands for that of every layer.
    hf_names: names of the tensors; `{}` is the layer's number.
    from_hf: (config, shape of the parameter in one layer, *tensors) -> the parameter.
    to_hf: (config, the parameter of one layer) -> the tensors. It runs on shapes alone too
        (`jax.eval_shape`), and uses what NumPy and JAX have in common.
    """

    param_path: str
    hf_names: tuple[str, ...]
    from_hf: Callable[..., np.ndarray]
    to_hf: Callable[[ModelConfig, Any], tuple[Any, ...]]

    @property
    def in_blocks(self) -> bool:
        """Whether every layer has this parameter."""
        return self.param_path.startswith("blocks/")


def same(param_path: str, hf_name: str) -> TensorMap:
    """A parameter with the same numbers in the same order; biases are flat in the file."""
    is_bias = param_path.endswith("bias")

    def from_hf(config: ModelConfig, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(shape)

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        return (param.reshape(-1) if is_bias else param,)

    return TensorMap(param_path, (hf_name,), from_hf, to_hf)


def table(param_path: str, hf_name: str) -> TensorMap:
    """A table [V, D]; our padding of the vocabulary is not in the file."""

    def from_hf(config: ModelConfig, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
        return tensor  # whoever stores it adds the padding

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        return (param[: config.vocab_size],)

    return TensorMap(param_path, (hf_name,), from_hf, to_hf)


def linear(param_path: str, hf_name: str, *, inputs: int = 1, transposed: bool = True) -> TensorMap:
    """A kernel with `inputs` leading input axes.

    transposed: the file has [out, in], as PyTorch's Linear; else [in, out], as GPT-2's Conv1D.
    """

    def from_hf(config: ModelConfig, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if transposed else tensor).reshape(shape)

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        matrix = param.reshape(math.prod(param.shape[:inputs]), -1)
        return (matrix.T if transposed else matrix,)

    return TensorMap(param_path, (hf_name,), from_hf, to_hf)


def split_qkv(param_path: str, q_name: str, k_name: str, v_name: str) -> TensorMap:
    """q [H C, D], k and v [K C, D], or their biases, in three tensors; here [D, K, G + 2, C]."""
    return TensorMap(param_path, (q_name, k_name, v_name), _join_qkv, _split_qkv)


def _join_qkv(
    config: ModelConfig, shape: tuple[int, ...], q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Each key/value head next to its own queries; the input axis, if any, comes first."""
    parts = [x.reshape(config.kv, -1, config.head_width, *x.shape[1:]) for x in (q, k, v)]
    heads = np.concatenate(parts, axis=1)  # [K, G + 2, C, D]
    return heads.transpose(3, 0, 1, 2) if heads.ndim == 4 else heads


def _split_qkv(config: ModelConfig, param: Any) -> tuple[Any, ...]:
    heads = param.transpose(1, 2, 3, 0) if param.ndim == 4 else param  # [K, G + 2, C, D]
    groups, inputs = config.heads // config.kv, heads.shape[3:]
    q, k, v = heads[:, :groups], heads[:, groups : groups + 1], heads[:, groups + 1 :]
    return q.reshape(-1, *inputs), k.reshape(-1, *inputs), v.reshape(-1, *inputs)


def stacked_qkv(param_path: str, hf_name: str) -> TensorMap:
    """q, k, v of `split_qkv` below one another in one tensor [(H + 2 K) C, D]."""

    def from_hf(config: ModelConfig, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
        q_rows, kv_rows = config.heads * config.head_width, config.kv * config.head_width
        q, k, v = np.split(tensor, [q_rows, q_rows + kv_rows])
        return _join_qkv(config, shape, q, k, v)

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        parts = _split_qkv(config, param)
        if isinstance(param, np.ndarray):
            return (np.concatenate(parts),)
        import jax.numpy as jnp  # only shapes are asked for

        return (jnp.concatenate(parts),)

    return TensorMap(param_path, (hf_name,), from_hf, to_hf)


def gpt2_qkv(param_path: str, hf_name: str) -> TensorMap:
    """GPT-2's q, k, v in one tensor [D, 3 H C], or bias [3 H C]: all q, then all k, then all v."""

    def from_hf(config: ModelConfig, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
        split = tensor.reshape(*tensor.shape[:-1], 3, config.heads, config.head_width)
        return split.swapaxes(-2, -3)

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        return (param.swapaxes(-2, -3).reshape(*param.shape[:-3], -1),)

    return TensorMap(param_path, (hf_name,), from_hf, to_hf)


def neox_qkv(param_path: str, hf_name: str) -> TensorMap:
    """GPT-NeoX's q, k, v in one tensor [H 3 C, D], or bias [H 3 C]: head by head."""

    def from_hf(config: ModelConfig, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
        split = tensor.reshape(config.heads, 3, config.head_width, *tensor.shape[1:])
        return split.transpose(3, 0, 1, 2) if split.ndim == 4 else split

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        if param.ndim == 4:
            return (param.transpose(1, 2, 3, 0).reshape(-1, param.shape[0]),)
        return (param.reshape(-1),)

    return TensorMap(param_path, (hf_name,), from_hf, to_hf)


def split_gate_up(param_path: str, gate_name: str, up_name: str) -> TensorMap:
    """The gate and the up projection [F, D] in two tensors; our kernel is [D, 2, F]."""

    def from_hf(
        config: ModelConfig, shape: tuple[int, ...], gate: np.ndarray, up: np.ndarray
    ) -> np.ndarray:
        return np.stack([gate.T, up.T], axis=-2)

    def to_hf(config: ModelConfig, param: Any) -> tuple[Any, ...]:
        return param[..., 0, :].T, param[..., 1, :].T

    return TensorMap(param_path, (gate_name, up_name), from_hf, to_hf)


def norm_maps(param_path: str, hf_module: str, *, bias: bool) -> list[TensorMap]:
    """A norm's scale, and its bias where it has one."""
    maps = [same(f"{param_path}/scale", f"{hf_module}.weight")]
    if bias:
        maps.append(same(f"{param_path}/bias", f"{hf_module}.bias"))
    return maps


def head_maps(config: ModelConfig, hf_name: str) -> list[TensorMap]:
    """A classifier's head, an untied language model's, or none."""
    if config.labels:
        return [same("score/kernel", "score.weight")]
    return [] if config.tie_embeddings else [table("head/kernel", hf_name)]
