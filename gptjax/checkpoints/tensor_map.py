"""TODO docstring."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.config.schema import ModelConfig

Raw = Mapping[str, Any]


Load = Callable[..., np.ndarray]  # (config, our shape, *their arrays) -> our array (of one layer)


Dump = Callable[
    [ModelConfig, Any], tuple[Any, ...]
]  # (config, our array of one layer) -> their arrays


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """`ours` (a path; below blocks/ it stands for every layer) is made of the tensors `theirs` (`{}` is the layer's number)."""

    ours: str
    theirs: tuple[str, ...]
    load: Load
    dump: Dump


def same(ours: str, theirs: str) -> TensorMap:
    return TensorMap(
        ours,
        (theirs,),
        lambda c, shape, a: a.reshape(shape),
        lambda c, x: (x.reshape(-1) if ours.endswith("bias") else x,),
    )


def table(ours: str, theirs: str) -> TensorMap:
    """An embedding: our padding of the vocabulary comes and goes."""
    return TensorMap(ours, (theirs,), lambda c, shape, a: a, lambda c, x: (x[: c.vocab_size],))


def linear(ours: str, theirs: str, *, inputs: int = 1, transposed: bool = True) -> TensorMap:
    """A kernel with `inputs` leading input axes; theirs is [out, in], or [in, out] where not `transposed` (GPT-2's Conv1D)."""

    def dump(c: ModelConfig, x: Any) -> tuple[Any, ...]:
        flat = x.reshape(math.prod(x.shape[:inputs]), -1)
        return (flat.T if transposed else flat,)

    return TensorMap(
        ours, (theirs,), lambda c, shape, a: (a.T if transposed else a).reshape(shape), dump
    )


def split_qkv(ours: str, *theirs: str) -> TensorMap:
    """q [H C, D], k and v [K C, D] (or biases) as our [D, K, G + 2, C]: each key/value head beside its own queries."""

    def load(
        c: ModelConfig, shape: tuple[int, ...], q: np.ndarray, k: np.ndarray, v: np.ndarray
    ) -> np.ndarray:
        rest = q.shape[1:]
        heads = np.concatenate(
            [a.reshape(c.kv, -1, c.head_width, *rest) for a in (q, k, v)], axis=1
        )
        return heads.transpose(3, 0, 1, 2) if rest else heads

    def dump(c: ModelConfig, x: Any) -> tuple[Any, ...]:
        heads = x.transpose(1, 2, 3, 0) if x.ndim == 4 else x
        groups, rest = c.heads // c.kv, heads.shape[3:]
        return tuple(
            part.reshape(-1, *rest)
            for part in (heads[:, :groups], heads[:, groups : groups + 1], heads[:, groups + 1 :])
        )

    return TensorMap(ours, theirs, load, dump)


def fused_qkv(ours: str, theirs: str, *, conv: bool) -> TensorMap:
    """q, k, v in one tensor: [D, 3, H, C] in GPT-2 (`conv`), [H, 3, C, D] in GPT-NeoX."""

    def load(c: ModelConfig, shape: tuple[int, ...], a: np.ndarray) -> np.ndarray:
        if conv:
            return a.reshape(*a.shape[:-1], 3, c.heads, c.head_width).swapaxes(-2, -3)
        split = a.reshape(c.heads, 3, c.head_width, *a.shape[1:])
        return split.transpose(3, 0, 1, 2) if split.ndim == 4 else split

    def dump(c: ModelConfig, x: Any) -> tuple[Any, ...]:
        if conv:
            return (x.swapaxes(-2, -3).reshape(*x.shape[:-3], -1),)
        return (
            (x.transpose(1, 2, 3, 0).reshape(-1, x.shape[0]) if x.ndim == 4 else x.reshape(-1)),
        )

    return TensorMap(ours, (theirs,), load, dump)


def gate_up_maps(ours: str, gate: str, up: str) -> TensorMap:
    load = lambda c, shape, a, b: np.stack([a.T, b.T], axis=-2)
    return TensorMap(ours, (gate, up), load, lambda c, x: (x[..., 0, :].T, x[..., 1, :].T))


def norm_maps(ours: str, theirs: str, bias: bool) -> list[TensorMap]:
    return [same(f"{ours}/scale", f"{theirs}.weight")] + (
        [same(f"{ours}/bias", f"{theirs}.bias")] if bias else []
    )


def head_maps(c: ModelConfig, theirs: str) -> list[TensorMap]:
    """The head on tokens that tells classes apart, or the one of an untied language model."""
    if c.labels:
        return [same("score/kernel", "score.weight")]
    return [] if c.tie_embeddings else [table("head/kernel", theirs)]
