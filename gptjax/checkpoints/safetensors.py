"""TODO docstring."""

from __future__ import annotations

import concurrent.futures
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.mapping import foreign_tensors, named
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import cli, files, tree
from gptjax.core.tree import nested
from gptjax.model.init import kernel_shapes

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names


_LAZY = DTYPES | {
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def _matched(
    c: ModelConfig, kind: str, found: Mapping[str, tuple[int, ...]]
) -> dict[int | None, list[tuple[TensorMap, list[str]]]]:
    """{layer: [(row, names in the file)]}, None for what is in no layer. Raises one UserError that lists all that is missing, extra or of another shape."""
    family = huggingface.FAMILIES[kind]
    if c.layers > len(found):  # before their names are spelled out: a damaged number can be huge
        raise UserError(
            f"config.json names {c.layers:,} layers and the file holds {len(found):,} tensors"
        )
    bare = not any(name.startswith(family.prefix) for name in found)
    expected: dict[str, tuple[int, ...]] = {}
    result: dict[int | None, list[tuple[TensorMap, list[str]]]] = {}
    for row, layer, tensors in foreign_tensors(c, kind):
        names = [name.removeprefix(family.prefix) if bare else name for name, _ in tensors]
        expected |= zip(names, (shape for _, shape in tensors), strict=True)
        result.setdefault(layer, []).append((row, names))
    ignored = {"lm_head.weight", "embed_out.weight"} if c.tie_embeddings or c.labels else set()
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [
        f"extra {name}"
        for name in found
        if name not in expected and name not in ignored and not huggingface.BUFFERS.fullmatch(name)
    ]
    faults += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if faults:
        shown = "\n  ".join(faults[:4] if len(faults) > 5 else faults)
        raise UserError(
            f"{len(faults)} tensors do not fit a {kind} model of this config.json:\n  {shown}"
        )
    return result


class LazyParams:
    """The parameters of a checkpoint that are yet to be read from its files, a layer at a time or all at once.

    place: its folder or file; found: {name in the file: shape}; get(name): the array. Raises UserError for what does not fit, and when read for what is
    not finite, or where a file has changed since."""

    def __init__(
        self,
        place: Path,
        c: ModelConfig,
        kind: str,
        found: Mapping[str, tuple[int, ...]],
        get: Callable[[str], np.ndarray],
    ):
        self._place, self._config, self._get = place, c, get
        self._tensors, self._shapes, self._ended = _matched(c, kind, found), kernel_shapes(c), False
        paths = place.absolute().glob("*.safetensors") if place.is_dir() else [place.absolute()]
        self._stamps = {path: _stamp(path) for path in paths}

    def end(self) -> None:
        """Lets a reading in another thread fail at its next tensor."""
        self._ended = True

    def part(self, layer: int | None) -> dict[str, Any]:
        """Nested dict of one layer's parameters as stored, views of the file where its order is ours; or with None of those in no layer, JAX arrays."""
        flat: dict[str, Any] = {}
        for row, names in self._tensors[layer]:
            ours = self._load(row, names)
            if (
                layer is None
            ):  # copied once, with our padding of the vocabulary: JAX takes these pages as they are
                own = _zeros(self._shapes[row.ours], ours.dtype)
                own[: len(ours)] = ours
                ours = jax.device_put(own)
            flat[row.ours.removeprefix("blocks/")] = ours
        return nested(flat)

    def params(self, dtype: str = "float32") -> dict[str, Any]:
        """Our parameters, blocks stacked on axis 0: each tensor is read once and written into its place. dtype "": as stored."""
        flat: dict[str, np.ndarray] = {}

        def put(item: tuple[int | None, TensorMap, list[str]]) -> None:
            layer, row, names = item
            ours, shape = self._load(row, names), self._shapes[row.ours]
            with lock:
                if row.ours not in flat:
                    kept = ours.dtype if not dtype else jax.numpy.dtype(dtype)
                    flat[row.ours] = _zeros(
                        shape if layer is None else (self._config.layers, *shape), kept
                    )
            place = flat[row.ours] if layer is None else flat[row.ours][layer]
            place[: len(ours)] = ours

        lock, items = (
            threading.Lock(),
            [(layer, *one) for layer, many in self._tensors.items() for one in many],
        )
        with concurrent.futures.ThreadPoolExecutor(
            min(4, os.cpu_count() or 1)
        ) as pool:  # NumPy copies and checks without the interpreter's lock
            list(pool.map(put, items))  # raises what `put` raised
        return nested(flat)

    def _load(self, row: TensorMap, names: list[str]) -> np.ndarray:
        with named(self._place):
            if self._ended:
                raise UserError("its reading was ended before all was read: load it again")
            if any(_stamp(path) != stamp for path, stamp in self._stamps.items()):
                raise UserError(
                    "a file of it was changed or removed while it was in use: load it again"
                )
            arrays = [self._get(name) for name in names]
            for name, array in zip(names, arrays, strict=True):
                if array.dtype.kind not in "fV" or not _finite(array):
                    what = "values that are not finite" if array.dtype.kind in "fV" else array.dtype
                    raise UserError(f"{name} holds {what}: the file is damaged")
            return row.load(self._config, self._shapes[row.ours], *arrays)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or removed."""
    try:
        info = path.stat()
    except OSError:
        return ()
    return info.st_ino, info.st_size, info.st_mtime_ns


def _finite(array: np.ndarray) -> bool:
    if array.dtype != np.float32:
        return bool(np.isfinite(array).all())
    with np.errstate(
        invalid="ignore"
    ):  # by extremes: no array of booleans, which is a quarter of it; slow in 16 bits
        return bool(np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0)))


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros in whole pages of their own: JAX on a CPU uses memory at a multiple of 64 bytes as it is. Not NumPy's, which asks for huge pages where the
    kernel leaves that to programs: a virtual machine may have to find each of those first (154 MB take 0.1 s in small ones, 0.03 to 0.6 s in huge ones)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


def read_safetensors(
    paths: list[Path],
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray], str]:
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
                    where[name] = (
                        path.absolute(),
                        8 + size + header[name]["data_offsets"][0],
                        header[name]["dtype"],
                    )
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}") from None

    def get(name: str) -> np.ndarray:
        path, start, kind = where[name]
        if kind not in _LAZY:
            raise UserError(f"{name} is stored as {kind}; what is read is {', '.join(DTYPES)}")
        dtype = np.dtype(jax.numpy.dtype(_LAZY[kind]))
        size = math.prod(found[name]) * dtype.itemsize
        raw = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.empty(0, np.uint8)
        return np.asarray(raw).view(dtype).reshape(found[name])

    dtypes = [kind for _, _, kind in where.values()]
    return found, get, DTYPES.get(max(set(dtypes), key=dtypes.count, default="F32"), "float32")


def open_tensors(
    folder: Path,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray], str]:
    """({name: shape}, name -> array, stored dtype) of the weights in a Hugging Face folder."""
    if (folder / "model.safetensors").exists():
        return read_safetensors([files.require_regular_file(folder / "model.safetensors")])
    if (index := folder / "model.safetensors.index.json").exists():
        places = files.read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(name, str) for name in places.values()
        ):
            raise UserError(f"{index} has no weight_map of names to files")
        if outside := [
            name for name in places.values() if Path(name).name != name or name in ("..", ".")
        ]:
            raise UserError(
                f"{index} names {outside[0]!r}, which is outside the checkpoint's folder"
            )
        return read_safetensors(
            [files.require_regular_file(folder / name) for name in sorted(set(places.values()))]
        )
    if (folder / "flax_model.msgpack").exists():
        return _msgpack(folder / "flax_model.msgpack")
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when it is read, so it is not read.\n"
            "Convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
        )
    raise UserError(
        f"{folder} has a config.json and no weights: no model.safetensors, no index, no flax_model.msgpack"
    )


def _msgpack(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray], str]:
    """transformers 4's Flax weights, under PyTorch's names; Flax's kernels are transposed."""
    from flax import serialization

    try:
        flat = {
            p.replace("/", "."): np.asarray(a)
            for p, a in tree.flatten(
                serialization.msgpack_restore(files.require_regular_file(path).read_bytes())
            ).items()
        }
    except Exception as error:  # whatever msgpack raises
        raise UserError(
            f"{path} is no Flax checkpoint: {type(error).__name__}: {str(error)[:150]}"
        ) from None
    arrays = {}
    for name, array in flat.items():
        module, _, kind = name.rpartition(".")
        arrays[
            f"{module}.{ {'kernel': 'weight', 'embedding': 'weight', 'scale': 'weight'}.get(kind, kind) }"
        ] = array.T if kind == "kernel" else array
    stored = str(next(iter(arrays.values())).dtype) if arrays else "float32"
    return {name: a.shape for name, a in arrays.items()}, arrays.__getitem__, stored


def write_safetensors(
    path: Path, tensors: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: str
) -> None:
    """The format is a length, a JSON header and the bytes; written here because the library's own writer holds all tensors at once."""
    kind, size, at = (
        {ours: theirs for theirs, ours in DTYPES.items()}[dtype],
        np.dtype(jax.numpy.dtype(dtype)).itemsize,
        0,
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape, _ in tensors:
        end = at + int(np.prod(shape)) * size
        header[name], at = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (
        files.atomic(path) as temporary,
        open(temporary, "wb") as file,
        cli.progress(f"writing {path.name}", len(tensors)) as advance,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _, make in tensors:
            array = make()
            if dtype == "float16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(
                    f"{name} holds values above 65,504, which float16 cannot: use bfloat16 or float32"
                )
            array = np.ascontiguousarray(array.astype(dtype, copy=False))
            file.write(array.view(np.uint8).data if array.size else b"")
            advance(1)
