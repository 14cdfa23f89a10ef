"""Their tensors to our parameters and back, by the tables of `gptjax.hf`.

Shapes of their tensors follow from ours, so every tensor of a file is accounted for before any is read; each is read and written once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.model.init import kernel_shapes


def foreign_tensors(
    c: ModelConfig, kind: str
) -> Iterator[tuple[TensorMap, int | None, list[tuple[str, tuple[int, ...]]]]]:
    """(row, layer or None, [(name, shape)]) of every tensor of the family's file, in its order."""
    shapes = kernel_shapes(c)
    rows = huggingface.FAMILIES[kind].rows(c)
    if {row.ours for row in rows} != set(shapes):
        raise UserError(
            f"a {kind} file cannot hold {sorted({row.ours for row in rows} ^ set(shapes))[:4]}"
        )
    for row in rows:
        dumped = jax.eval_shape(
            lambda x, row=row: row.dump(c, x), jax.ShapeDtypeStruct(shapes[row.ours], np.float32)
        )
        for layer in range(c.layers) if row.ours.startswith("blocks/") else (None,):
            yield (
                row,
                layer,
                [
                    (name.format(layer), tuple(d.shape))
                    for name, d in zip(row.theirs, dumped, strict=True)
                ],
            )


@contextlib.contextmanager
def named(place: Path) -> Iterator[None]:
    """Errors name the checkpoint."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(place) in str(error) else f"{place}: {error}") from None


def from_params(
    c: ModelConfig, params: Any
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, array when called) of each of their tensors, one by one: nothing is copied before its turn."""
    flat = tree.flatten(params)
    for row, layer, tensors in foreign_tensors(c, huggingface.family_of(c)):
        for part, (name, shape) in enumerate(tensors):

            def make(
                row: TensorMap = row, layer: int | None = layer, part: int = part
            ) -> np.ndarray:
                leaf = (
                    np.asarray(flat[row.ours])
                    if layer is None
                    else np.asarray(flat[row.ours][layer])
                )
                return np.ascontiguousarray(row.dump(c, leaf)[part])

            yield name, shape, make
