"""Their tensors to our parameters and back, by the tables of `gptjax.hf`.

Shapes of their tensors follow from ours, so every tensor of a file is accounted for before any is read; each is read and written once.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import cli, files, hf, model, tree
from gptjax.config import ModelConfig, UserError

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names
_STORED = DTYPES | {"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


@functools.lru_cache(8)
def our_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape of one layer (below blocks/) or of the whole parameter}."""
    shapes = jax.eval_shape(functools.partial(model.init_params, c), jax.random.key(0))
    return {path: tuple(s.shape[1:] if path.startswith("blocks/") else s.shape) for path, s in tree.flatten(shapes).items()}


def their_tensors(c: ModelConfig, kind: str) -> Iterator[tuple[hf.Row, int | None, list[tuple[str, tuple[int, ...]]]]]:
    """(row, layer or None, [(name, shape)]) of every tensor of the family's file, in its order."""
    shapes = our_shapes(c)
    rows = hf.FAMILIES[kind].rows(c)
    if {row.ours for row in rows} != set(shapes):
        raise UserError(f"a {kind} file cannot hold {sorted({row.ours for row in rows} ^ set(shapes))[:4]}")
    for row in rows:
        dumped = jax.eval_shape(lambda x, row=row: row.dump(c, x), jax.ShapeDtypeStruct(shapes[row.ours], np.float32))
        for layer in range(c.layers) if row.ours.startswith("blocks/") else (None,):
            yield row, layer, [(name.format(layer), tuple(d.shape)) for name, d in zip(row.theirs, dumped, strict=True)]


def match_names(c: ModelConfig, kind: str, found: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{their full name: name in the file}. Raises one UserError that lists all that is missing, extra or of another shape."""
    family = hf.FAMILIES[kind]
    if c.layers > len(found):  # before their names are spelled out: a damaged number can be huge
        raise UserError(f"config.json names {c.layers:,} layers and the file holds {len(found):,} tensors")
    bare = not any(name.startswith(family.prefix) for name in found)
    expected: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    for _, _, tensors in their_tensors(c, kind):
        for name, shape in tensors:
            names[name] = name.removeprefix(family.prefix) if bare else name
            expected[names[name]] = shape
    ignored = {"lm_head.weight", "embed_out.weight"} if c.tied or c.labels else set()
    rows = [f"missing {name}" for name in expected if name not in found]
    rows += [f"extra {name}" for name in found if name not in expected and name not in ignored and not hf.BUFFERS.fullmatch(name)]
    rows += [f"{name} is {list(found[name])} instead of {list(shape)}" for name, shape in expected.items() if found.get(name, shape) != shape]
    if rows:
        raise UserError(f"{len(rows)} tensors do not fit a {kind} model of this config.json:\n  " + "\n  ".join(rows[:4] if len(rows) > 5 else rows))
    return names


def to_params(c: ModelConfig, kind: str, found: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray], dtype: str) -> dict[str, Any]:
    """Our parameters from their tensors: each is read once and written into its place in the stack of layers.

    found: {name in the file: shape}; get(name): the array. dtype "": as stored. Raises UserError for what does not fit or is not finite.
    """
    names, shapes = match_names(c, kind, found), our_shapes(c)
    flat: dict[str, np.ndarray] = {}

    def put(item: tuple[hf.Row, int | None, list[tuple[str, tuple[int, ...]]]]) -> None:
        row, layer, tensors = item
        arrays = [get(names[name]) for name, _ in tensors]
        for (name, _), array in zip(tensors, arrays, strict=True):
            if array.dtype.kind not in "fV" or not _finite(array):
                what = "values that are not finite" if array.dtype.kind in "fV" else array.dtype
                raise UserError(f"{names[name]} holds {what}: the file is damaged")
        ours = row.load(c, shapes[row.ours], *arrays)
        with lock:
            if row.ours not in flat:
                kept = ours.dtype if not dtype else jax.numpy.dtype(dtype)
                flat[row.ours] = _zeros(shapes[row.ours] if layer is None else (c.layers, *shapes[row.ours]), kept)
        place = flat[row.ours] if layer is None else flat[row.ours][layer]
        place[: len(ours)] = ours  # an embedding comes without our padding of the vocabulary

    lock = threading.Lock()
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # NumPy copies and checks without the interpreter's lock
        list(pool.map(put, their_tensors(c, kind)))  # raises what `put` raised
    return nested(flat)


def _finite(array: np.ndarray) -> bool:
    if array.dtype != np.float32:
        return bool(np.isfinite(array).all())
    with np.errstate(invalid="ignore"):  # by extremes: no array of booleans, which is a quarter of it; slow in 16 bits
        return bool(np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0)))


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros at a multiple of 64 bytes: JAX on a CPU then uses the memory as it is, where it would copy other arrays."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    result: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return result


def from_params(c: ModelConfig, params: Any) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, array when called) of each of their tensors, one by one: nothing is copied before its turn."""
    flat = tree.flatten(params)
    for row, layer, tensors in their_tensors(c, hf.family_of(c)):
        for part, (name, shape) in enumerate(tensors):

            def make(row: hf.Row = row, layer: int | None = layer, part: int = part) -> np.ndarray:
                leaf = np.asarray(flat[row.ours]) if layer is None else np.asarray(flat[row.ours][layer])
                return np.ascontiguousarray(row.dump(c, leaf)[part])

            yield name, shape, make


def read_safetensors(paths: list[Path]) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray], str]:
    """({name: shape}, name -> array, stored dtype) of plain files that together hold a checkpoint. The library checks them; arrays are mapped one by
    one, since all that it maps stays in memory until the last one is read. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    where: dict[str, tuple[Path, int, str]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="np") as file, open(path, "rb") as raw:
                (size,) = struct.unpack("<Q", raw.read(8))
                header = json.loads(raw.read(size))
                for name in file.keys():  # noqa: SIM118  (the handle is no dict)
                    found[name] = tuple(header[name]["shape"])
                    where[name] = path, 8 + size + header[name]["data_offsets"][0], header[name]["dtype"]
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}") from None

    def get(name: str) -> np.ndarray:
        path, start, kind = where[name]
        if kind not in _STORED:
            raise UserError(f"{name} is stored as {kind}; what is read is {', '.join(DTYPES)}")
        dtype = np.dtype(jax.numpy.dtype(_STORED[kind]))
        size = math.prod(found[name]) * dtype.itemsize
        raw = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.empty(0, np.uint8)
        return np.asarray(raw).view(dtype).reshape(found[name])

    dtypes = [kind for _, _, kind in where.values()]
    return found, get, DTYPES.get(max(set(dtypes), key=dtypes.count, default="F32"), "float32")


def write_safetensors(path: Path, tensors: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: str) -> None:
    """The format is a length, a JSON header and the bytes; written here because the library's own writer holds all tensors at once."""
    kind, size, at = {ours: theirs for theirs, ours in DTYPES.items()}[dtype], np.dtype(jax.numpy.dtype(dtype)).itemsize, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape, _ in tensors:
        end = at + int(np.prod(shape)) * size
        header[name], at = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.atomic(path) as temporary, open(temporary, "wb") as file, cli.progress(f"writing {path.name}", len(tensors)) as advance:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _, make in tensors:
            array = make()
            if dtype == "float16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(f"{name} holds values above 65,504, which float16 cannot: use bfloat16 or float32")
            array = np.ascontiguousarray(array.astype(dtype, copy=False))
            file.write(array.view(np.uint8).data if array.size else b"")
            advance(1)
