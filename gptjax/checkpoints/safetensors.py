"""Weights in files, read when they are asked for (`LazyParams`), and safetensors files written.

In goes a folder with safetensors, or with the msgpack of transformers 4's Flax models; out come
the parameters of `model/`, by the maps of a family. gguf.py gives its tensors the same form.
Pickles (`.bin`, `.pt`) are never read: they can run code.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.checkpoints import foreign_weights, huggingface
from gptjax.checkpoints.families.common import Family
from gptjax.checkpoints.mapping import Shape, WritableTensor, hf_tensors, naming
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import cli, files, tree
from gptjax.core.tree import nested
from gptjax.model.init import kernel_shapes

# Names of dtypes in safetensors: NumPy's. Weights are stored in these ...
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# ... and a tensor in one of these is read, to be refused by name or ignored as a buffer.
_READABLE = DTYPES | {
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

# Heads that files carry and that a tied model, or a classifier, does not use.
_UNUSED_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})


@dataclasses.dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint's files.

    shapes: {name: shape}. read: name -> array, which may be a view of the file. dtype: the one
    that most tensors are stored in, a value of `DTYPES`. kinds: {name: dtype} as safetensors names
    it, where that is the format.
    """

    shapes: dict[str, Shape]
    read: Callable[[str], np.ndarray]
    dtype: str = "float32"
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)


class _Source(NamedTuple):
    """One parameter and the tensors of the files that hold it, under the files' own names."""

    tensor_map: TensorMap
    names: list[str]


def _match_tensors(
    config: ModelConfig, family: Family, stored: dict[str, Shape]
) -> dict[int | None, list[_Source]]:
    """{layer: what its parameters are read from}; None: those that are in no layer.

    Raises one UserError that lists all that is missing, extra or of another shape.
    """
    # before names are spelled out: a damaged number of layers can be huge
    if config.layers > len(stored):
        raise UserError(
            f"config.json names {config.layers:,} layers and the file holds {len(stored):,} tensors"
        )
    # files that hold the decoder without a head leave the prefix out
    has_prefix = any(name.startswith(family.prefix) for name in stored)
    expected: dict[str, Shape] = {}
    sources: dict[int | None, list[_Source]] = {}
    for tensor_map, layer, shapes in hf_tensors(config, family):
        if not has_prefix:
            shapes = {name.removeprefix(family.prefix): s for name, s in shapes.items()}
        expected |= shapes
        sources.setdefault(layer, []).append(_Source(tensor_map, list(shapes)))
    ignored = _UNUSED_HEADS if config.tie_embeddings or config.labels else frozenset()
    if faults := _differences(expected, stored, ignored):
        listed = "\n  ".join(faults[:4] if len(faults) > 5 else faults)
        raise UserError(
            f"{len(faults)} tensors do not fit a {family.model_type} model of this config.json:"
            f"\n  {listed}{_head_hint(config, stored)}"
        )
    return sources


def _head_hint(config: ModelConfig, stored: dict[str, Shape]) -> str:
    """A line where config.json names another head than the files hold."""
    if "score.weight" in stored and not config.labels:
        return (
            "\nscore.weight is a classifier's head: config.json must name its "
            "...ForSequenceClassification in architectures"
        )
    if config.labels and "score.weight" not in stored:
        return (
            "\nconfig.json names a classifier, and its head score.weight is missing: for a "
            "language model, name its ...ForCausalLM in architectures"
        )
    if not config.tie_embeddings and not config.labels and not _UNUSED_HEADS & stored.keys():
        return "\nwhere the head is the embedding, config.json has tie_word_embeddings = true"
    return ""


def _differences(
    expected: dict[str, Shape], stored: dict[str, Shape], ignored: frozenset[str]
) -> list[str]:
    """A line for each tensor that is missing, extra or of another shape."""
    missing = [f"missing {name}" for name in expected if name not in stored]
    extra = []
    for name in stored:
        is_buffer = huggingface.BUFFERS.fullmatch(name)
        if name not in expected and name not in ignored and not is_buffer:
            extra.append(f"extra {name}")
    other_shapes = []
    for name, shape in expected.items():
        if stored.get(name, shape) != shape:
            other_shapes.append(f"{name} is {list(stored[name])} instead of {list(shape)}")
    return missing + extra + other_shapes


class LazyParams:
    """The parameters of a checkpoint that are yet to be read, a layer at a time or all at once.

    path: its folder or file; tensors: what it holds. Raises UserError for what does not fit, and
    when read for numbers that are not finite, or where a file has changed since.
    """

    def __init__(self, path: Path, config: ModelConfig, family: Family, tensors: StoredTensors):
        self._path, self._config, self._tensors = path, config, tensors
        self._sources = _match_tensors(config, family, tensors.shapes)
        self._shapes = kernel_shapes(config)
        self._ended = False
        path = path.absolute()
        paths = path.glob("*.safetensors") if path.is_dir() else [path]
        self._stamps = {path: _stamp(path) for path in paths}

    def end(self) -> None:
        """Lets a reading in another thread fail at its next tensor."""
        self._ended = True

    def part(self, layer: int | None) -> dict[str, Any]:
        """One layer's parameters as stored, as a nested dict; with None, those in no layer.

        Those of a layer are views of the file where the order is the same; the others JAX arrays.
        """
        flat: dict[str, Any] = {}
        for tensor_map, names in self._sources[layer]:
            param: Any = self._load(tensor_map, names)
            if layer is None:
                # copied once, with the padding of the vocabulary: JAX takes these pages as they are
                padded = _zeros(self._shapes[tensor_map.param_path], param.dtype)
                padded[: len(param)] = param
                param = jax.device_put(padded)
            flat[tensor_map.param_path.removeprefix("blocks/")] = param
        return nested(flat)

    def params(self, dtype: str = "float32") -> dict[str, Any]:
        """All parameters, blocks stacked on axis 0: each tensor is read once, into its place.

        dtype: of the result; "" keeps the stored one.
        """
        flat: dict[str, np.ndarray] = {}
        lock = threading.Lock()

        def read_into_place(layer: int | None, source: _Source) -> None:
            tensor_map, names = source
            path = tensor_map.param_path
            param = self._load(tensor_map, names)
            with lock:
                if path not in flat:
                    shape = self._shapes[path]
                    full = shape if layer is None else (self._config.layers, *shape)
                    flat[path] = _zeros(full, jax.numpy.dtype(dtype) if dtype else param.dtype)
            target = flat[path] if layer is None else flat[path][layer]
            target[: len(param)] = param

        jobs = []
        for layer, sources in self._sources.items():
            jobs += [(layer, source) for source in sources]
        # NumPy copies and checks without the interpreter's lock, so threads help
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda job: read_into_place(*job), jobs):
                pass  # raises what a thread raised
        return nested(flat)

    def _load(self, tensor_map: TensorMap, names: list[str]) -> np.ndarray:
        """One parameter of one layer."""
        with naming(self._path):
            if self._ended:
                raise UserError("its reading was ended before all was read: load it again")
            if any(_stamp(path) != stamp for path, stamp in self._stamps.items()):
                raise UserError(
                    "a file of it was changed or removed while it was in use: load it again"
                )
            arrays = [self._tensors.read(name) for name in names]
            for name, array in zip(names, arrays, strict=True):
                if array.dtype.kind not in "fV":  # V: bfloat16, which NumPy does not know
                    raise UserError(
                        f"{name} holds {array.dtype} and no floating-point numbers: the file is "
                        "damaged, or quantised in a way that is not known here"
                    )
                if not _is_finite(array):
                    raise UserError(f"{name} holds values that are not finite: the file is damaged")
            return tensor_map.from_hf(self._config, self._shapes[tensor_map.param_path], *arrays)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or removed."""
    try:
        info = path.stat()
    except OSError:
        return ()
    return info.st_ino, info.st_size, info.st_mtime_ns


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype != np.float32:
        return bool(np.isfinite(array).all())
    # by extremes, which needs no array of booleans, a quarter of it; in 16 bits that is slow
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0)))


def _zeros(shape: Shape, dtype: Any) -> np.ndarray:
    """Zeros in complete pages of their own: JAX on a CPU uses aligned memory without a copy.

    Not NumPy's, which asks for huge pages where the kernel leaves that to programs: a virtual
    machine may have to find each of those first (154 MB take 0.1 s in small pages, 0.03 to 0.6 s
    in huge ones).
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


class _Extent(NamedTuple):
    """Where a tensor lies: its file, the offset of its first byte, and its dtype's name."""

    path: Path
    start: int
    dtype: str


def read_safetensors(paths: list[Path]) -> StoredTensors:
    """The tensors of files that together hold a checkpoint. Raises UserError.

    The library checks the files. Arrays are mapped here, one by one, because all that the library
    maps stays in memory until the last tensor is read.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, Shape] = {}
    extents: dict[str, _Extent] = {}
    for path in paths:
        try:
            with safe_open(path, framework="np") as checked, open(path, "rb") as raw:
                (size,) = struct.unpack("<Q", raw.read(8))
                header = json.loads(raw.read(size))
                for name in checked.keys():  # noqa: SIM118  (the handle is no dict)
                    if name in extents:
                        other = extents[name].path.name
                        raise UserError(f"{name} is in {other} and in {path.name}: which counts?")
                    entry = header[name]
                    start = 8 + size + entry["data_offsets"][0]
                    shapes[name] = tuple(entry["shape"])
                    extents[name] = _Extent(path.absolute(), start, entry["dtype"])
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a complete safetensors file: {error}") from None

    def read(name: str) -> np.ndarray:
        path, start, kind = extents[name]
        if kind not in _READABLE:
            raise UserError(f"{name} is stored as {kind}; supported: {', '.join(DTYPES)}")
        dtype = np.dtype(jax.numpy.dtype(_READABLE[kind]))
        size = math.prod(shapes[name]) * dtype.itemsize
        raw = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.empty(0, np.uint8)
        return np.asarray(raw).view(dtype).reshape(shapes[name])

    kinds = {name: extent.dtype for name, extent in extents.items()}
    counts = collections.Counter(kinds.values())
    usual = max(counts, key=lambda kind: counts[kind], default="F32")
    return StoredTensors(shapes, read, DTYPES.get(usual, "float32"), kinds)


def open_tensors(folder: Path) -> StoredTensors:
    """The weights in a Hugging Face folder. Raises UserError where there are none to be read."""
    single = folder / "model.safetensors"
    if single.exists():
        return read_safetensors([files.require_regular_file(single)])
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return read_safetensors(_indexed_files(index))
    if (folder / "flax_model.msgpack").exists():
        return _read_msgpack(folder / "flax_model.msgpack")
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when it is read, so it is not read.\n"
            f"{foreign_weights.CONVERT}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise UserError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json, but "
            f"{', '.join(others[:3])}:\nrename a single file to model.safetensors; parts need the "
            "index that came with them"
        )
    raise UserError(
        f"{folder} has a config.json and no weights: "
        "no model.safetensors, no index, no flax_model.msgpack"
    )


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, all in its own folder."""
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise UserError(f"{index} has no weight_map of names to files")
    for name in weight_map.values():
        if Path(name).name != name or name in ("..", "."):
            raise UserError(f"{index} names {name!r}, which is outside the checkpoint's folder")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise UserError(
            f"{len(missing)} of the {len(names)} files that {index} names are missing, "
            f"{', '.join(missing[:3])} among them: download them again"
        )
    return [files.require_regular_file(index.parent / name) for name in names]


def with_own_head(
    config: ModelConfig, family: Family, stored: StoredTensors
) -> tuple[ModelConfig, StoredTensors]:
    """The config and tensors of a model that says it is tied, after what the file has.

    A file with the head alone has the embedding by that name. One with both, that differ, is not
    tied, which is said on stderr (as in transformers 5). Raises UserError for a head that is none.
    """
    if not config.tie_embeddings or config.labels:
        return config, stored
    untied = dataclasses.replace(config, tie_embeddings=False)
    names = {m.param_path: m.hf_names[0] for m in family.tensor_maps(untied)}
    head, table = names["head/kernel"], names["embed/tokens"]
    if not any(name.startswith(family.prefix) for name in stored.shapes):
        table = table.removeprefix(family.prefix)
    if head not in stored.shapes:
        return config, stored
    if table not in stored.shapes:
        shapes = {table if name == head else name: s for name, s in stored.shapes.items()}
        read = lambda name: stored.read(head if name == table else name)
        return config, dataclasses.replace(stored, shapes=shapes, read=read)
    if stored.shapes[head] == stored.shapes[table] and _equal(stored, head, table):
        return config, stored
    cli.say(
        f"note: config.json says tie_word_embeddings = true, but {head} and {table} differ: "
        "the head in the file is used"
    )
    return untied, stored


def _equal(stored: StoredTensors, name: str, other: str) -> bool:
    """Whether two matrices hold the same numbers, compared in strips of 64 MiB at most."""
    a, b = stored.read(name), stored.read(other)
    step = max(1, (64 << 20) // max(1, a[:1].nbytes))
    return all(
        np.array_equal(a[start : start + step], b[start : start + step])
        for start in range(0, len(a), step)
    )


def _read_msgpack(path: Path) -> StoredTensors:
    """transformers 4's Flax weights, under PyTorch's names; Flax's kernels are transposed."""
    from flax import serialization

    try:
        data = files.require_regular_file(path).read_bytes()
        leaves = tree.flatten(serialization.msgpack_restore(data))
        flat = {name.replace("/", "."): np.asarray(leaf) for name, leaf in leaves.items()}
    except Exception as error:  # whatever msgpack raises
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise UserError(f"{path} is no Flax checkpoint: {reason}") from None
    arrays = {}
    for name, array in flat.items():
        module, _, kind = name.rpartition(".")
        torch_kind = "weight" if kind in ("kernel", "embedding", "scale") else kind
        arrays[f"{module}.{torch_kind}"] = array.T if kind == "kernel" else array
    dtype = str(next(iter(arrays.values())).dtype) if arrays else "float32"
    shapes = {name: array.shape for name, array in arrays.items()}
    return StoredTensors(shapes, arrays.__getitem__, dtype)


def write_safetensors(path: Path, tensors: Sequence[WritableTensor], dtype: str) -> None:
    """Writes the tensors in `dtype`, a value of `DTYPES`, making one after the other.

    The format is a length, a JSON header and the bytes. It is written here because the library's
    own writer holds all tensors at once. Raises UserError for numbers that float16 cannot hold.
    """
    kind = {numpy_name: name for name, numpy_name in DTYPES.items()}[dtype]
    itemsize = np.dtype(jax.numpy.dtype(dtype)).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, _ in tensors:
        end = start + int(np.prod(shape)) * itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
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
                    f"{name} holds values above 65,504, which float16 cannot hold: "
                    "use bfloat16 or float32"
                )
            array = np.ascontiguousarray(array.astype(dtype, copy=False))
            file.write(array.view(np.uint8).data if array.size else b"")
            advance(1)
