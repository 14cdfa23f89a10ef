"""The container that a GGUF file is: keys with values, then tensors at offsets.

`read_header` reads it, of all parts of a split file, and says where a damaged one ends. The package
`gguf` is asked for the sizes and the unpacking of quantised types alone.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import files

Shape = tuple[int, ...]

# The format's numbers of types: (struct's letter, NumPy's name).
_NUMBERS = {
    0: ("B", "u1"),
    1: ("b", "i1"),
    2: ("H", "u2"),
    3: ("h", "i2"),
    4: ("I", "u4"),
    5: ("i", "i4"),
    6: ("f", "f4"),
    7: ("?", "?"),
    10: ("Q", "u8"),
    11: ("q", "i8"),
    12: ("d", "f8"),
}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """Where a tensor lies. shape: as in NumPy. kind: a gguf.GGMLQuantizationType."""

    path: Path
    shape: Shape
    kind: Any
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers begin. paths: its parts, one or several."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    paths: tuple[Path, ...]


def package() -> Any:
    """The package gguf. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'gptjax[gguf]'") from None
    return gguf


def read_header(path: Path) -> Header:
    """The keys and the tensors' places of a file, and of its other parts. Raises UserError."""
    first = _read_part(path)
    count = first.meta.get("split.count") or 1
    if count == 1:
        return first
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts, which are found by their names alone: "
            f"name them NAME-00001-of-{count:05d}.gguf and so on"
        )
    paths = [path.with_name(f"{name[1]}-{i:05d}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    if first.meta.get("split.no"):
        raise UserError(f"{path} is part {first.meta['split.no'] + 1} of {count}: name {paths[0]}")
    tensors = dict(first.tensors)
    for number, part_path in enumerate(paths[1:], 1):
        if not part_path.exists():
            raise UserError(f"{path} is split into {count} parts, and {part_path} is missing")
        part = _read_part(files.require_regular_file(part_path))
        if part.meta.get("split.no") != number or part.tensors.keys() & tensors.keys():
            raise UserError(f"{part_path} is not part {number + 1} of {path}")
        tensors |= part.tensors
    if len(tensors) != first.meta.get("split.tensors.count", len(tensors)):
        raise UserError(
            f"{path}: its {count} parts hold {len(tensors)} tensors instead of "
            f"{first.meta['split.tensors.count']}: parts of another file are among them"
        )
    return Header(first.meta, tensors, tuple(paths))


def _read_part(path: Path) -> Header:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is neither a folder nor a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(path, data))


def _parse(path: Path, cursor: _Cursor) -> Header:
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:
        raise UserError(
            f"{path} is a big-endian GGUF file: turn it with the script gguf_convert_endian of the "
            "package gguf"
        )
    if version not in (2, 3):
        raise UserError(
            f"{path} is of GGUF's version {version}, and 2 and 3 are read: "
            "convert the model again with today's llama.cpp"
        )
    tensor_count = cursor.count("the number of tensors", smallest=24)
    key_count = cursor.count("the number of keys", smallest=13)
    meta: dict[str, Any] = {}
    for number in range(key_count):
        key = cursor.string(f"key {number}")
        if key in meta:
            raise UserError(f"{path} is damaged: it has the key {key!r} twice")
        meta[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
    entries: list[tuple[str, Shape, int, int]] = []
    for number in range(tensor_count):
        name = cursor.string(f"the name of tensor {number}")
        axes = cursor.number("I", name)
        if axes > 4:
            raise UserError(f"{path} is damaged: the tensor {name!r} has {axes:,} axes")
        sizes = [cursor.number("Q", name) for _ in range(axes)]
        kind, offset = cursor.number("I", name), cursor.number("Q", name)
        entries.append((name, tuple(sizes[::-1]), kind, offset))
    alignment = meta.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{path} is damaged: general.alignment = {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise UserError(f"{path} is damaged: it has the tensor {name!r} twice")
        tensors[name] = _place(path, name, shape, kind, start + offset, cursor.size)
    return Header(meta, tensors, (path,))


def _place(path: Path, name: str, shape: Shape, number: int, start: int, size: int) -> Tensor:
    """The tensor at `start` of a file of `size` bytes. Raises UserError where it is not there."""
    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UserError(
            f"{path}: {name} is stored as type {number}, which the installed package gguf does not "
            "know: pip install -U gguf"
        ) from None
    if shape and shape[-1] % block:
        raise UserError(
            f"{path} is damaged: rows of {name} hold {shape[-1]} values, and {kind.name} packs "
            f"{block} at a time"
        )
    nbytes = math.prod(shape) // block * block_bytes
    if start + nbytes > size:
        raise UserError(
            f"{path} ends at byte {size:,} inside the tensor {name}, which lies at bytes "
            f"{start:,} to {start + nbytes:,}: it is truncated, so fetch it again"
        )
    return Tensor(path.absolute(), shape, kind, start, nbytes)


class _Cursor:
    """A position in a file's header that moves as values are read. Raises UserError at its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data = path, data
        self.at, self.size = 4, len(data)

    def number(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        return struct.unpack("<" + letter, self._take(size, what))[0]

    def count(self, what: str, *, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, that the rest can hold."""
        at, number = self.at, self.number("Q", what)
        if number * smallest > self.size - self.at:
            raise UserError(
                f"{self._path} is damaged or truncated: {what} at byte {at:,} is {number:,}, and "
                f"{self.size - self.at:,} bytes follow"
            )
        return int(number)

    def string(self, what: str) -> str:
        at, size = self.at, self.number("Q", what)
        try:
            return self._take(size, what).decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path} is damaged: {what} at byte {at:,} is no UTF-8 ({error.reason})"
            ) from None

    def value(self, kind: int, key: str) -> Any:
        """A number, a string, or a list of either."""
        if kind == _STRING:
            return self.string(key)
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind][0], key)
        if kind != _ARRAY:
            raise UserError(f"{self._path} is damaged: {key} is of the unknown type {kind}")
        item = self.number("I", key)
        if item in _NUMBERS:
            dtype = np.dtype(_NUMBERS[item][1]).newbyteorder("<")
            count = self.count(f"the length of {key}", smallest=dtype.itemsize)
            return np.frombuffer(self._take(count * dtype.itemsize, key), dtype).tolist()
        count = self.count(f"the length of {key}", smallest=8)
        if item == _STRING:
            return [self.string(key) for _ in range(count)]
        return [self.value(item, key) for _ in range(count)]

    def _take(self, size: int, what: str) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > self.size:
            raise UserError(
                f"{self._path} ends at byte {self.size:,} inside its header ({what}, at byte "
                f"{start:,}): it is truncated, so fetch it again"
            )
        return self._data[start : self.at]


def reader(tensors: dict[str, Tensor]) -> Callable[[str], np.ndarray]:
    """A function from a tensor's name to its values, float32.

    Raises UserError at once for a tensor of a type that cannot be unpacked.
    """
    gguf = package()
    types = gguf.GGMLQuantizationType
    plain = {types.F32: np.float32, types.F16: np.float16, types.F64: np.float64}
    tried = set(plain)
    for name, tensor in tensors.items():
        if tensor.kind not in tried and not _can_unpack(gguf, tensor.kind):
            raise UserError(
                f"{tensor.path}: {name} is stored as {tensor.kind.name}, which is not read here; "
                "write the file as f16 or Q8_0: llama-quantize --allow-requantize FILE NEW f16"
            )
        tried.add(tensor.kind)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if not tensor.nbytes:
            return np.zeros(tensor.shape, np.float32)
        # mapped one by one: all at once would stay in memory next to the model
        raw = np.asarray(np.memmap(tensor.path, np.uint8, "r", tensor.start, (tensor.nbytes,)))
        if tensor.kind in plain:
            array = raw.view(plain[tensor.kind])
        else:
            rows = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            array = gguf.dequantize(raw.reshape(rows), tensor.kind)
        return array.astype(np.float32, copy=False).reshape(tensor.shape)

    return read


def _can_unpack(gguf: Any, kind: Any) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
