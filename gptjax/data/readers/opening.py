"""Opening files of text, compressed or not: what a file holds decides, not its name.

To read one more compression, add a row to _COMPRESSIONS; to name one more kind of file that is no
text, add one to _NO_TEXT.
"""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import hashlib
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config.errors import UserError
from gptjax.core.files import decode

_CHUNK = 1 << 16  # compressed bytes read at once
_HEAD = 4096  # decompressed bytes that tell what a file is


def _zstd_decompressor() -> Any:
    """Raises ImportError."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})


@dataclasses.dataclass(frozen=True)
class _Compression:
    name: str
    begins: re.Pattern[bytes]
    decompressor: Callable[[], Any]
    tool: str  # that prints what a file holds


_COMPRESSIONS = (
    _Compression("gzip", re.compile(rb"\x1f\x8b"), lambda: zlib.decompressobj(wbits=31), "zcat"),
    _Compression(
        "bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor, "bzcat"
    ),
    _Compression("xz", re.compile(rb"\xfd7zXZ\x00"), lzma.LZMADecompressor, "xzcat"),
    _Compression("zstd", re.compile(rb"\x28\xb5\x2f\xfd"), _zstd_decompressor, "zstdcat"),
)
COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")  # after the suffix of any format of text
_LARGEST_EMPTY = 128  # bytes that a compressed file of nothing may have
_UTF16 = "UTF-16 text"
# what a file begins with (at which byte): what it is, and a way out
_NO_TEXT: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"%PDF-", "a PDF", "take the text out, for example with pdftotext"),
    (0, b"PK\x03\x04", "a zip archive or Office document", "unpack it, or save it as text"),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", "save it as text"),
    (0, b"{\\rtf", "a Rich Text document", "save it as text"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"\x1f\x9d", "a file of compress", "unpack it with uncompress"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", "unpack it with lz4 -d"),
    (0, b"Rar!", "a RAR archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it with tar -xf and name the folder"),
    (0, b"PAR1", "a parquet file", "read it with --config.data.source=parquet"),
    (0, b"ARROW1", "an Arrow file", "write it as parquet or jsonl"),
    (0, b"SQLite format 3", "a SQLite database", "export its text as csv or jsonl"),
    (0, b"\x89HDF", "an HDF5 file", "export its text as csv or jsonl"),
    (0, b"\x89PNG", "a picture", "leave it out"),
    (0, b"\xff\xd8\xff", "a picture", "leave it out"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file", "run git lfs pull"),
    (0, b"\xff\xfe\x00\x00", "UTF-32 text", "UTF-32"),
    (0, b"\x00\x00\xfe\xff", "UTF-32 text", "UTF-32"),
    (0, b"\xff\xfe", _UTF16, "UTF-16"),
    (0, b"\xfe\xff", _UTF16, "UTF-16"),
)


def with_compression(suffixes: Sequence[str]) -> tuple[str, ...]:
    """The suffixes alone, and with that of each compression behind them."""
    endings: list[str] = []
    for suffix in suffixes:
        endings += [suffix + ending for ending in COMPRESSED]
    return tuple(endings)


def open_text(path: Path) -> BinaryIO:
    """The decompressed bytes of a file of text.

    Raises UserError for a file that is no text or no UTF-8, as far as its first bytes tell, and
    while reading, where a compressed file is damaged.
    """
    head, compression = _beginning(path)
    _check_is_text(head, path, compression)
    if compression is None and path.suffix.lower() in COMPRESSED[1:] and not _is_utf8(head):
        raise UserError(
            f"{path} does not begin as a {path.suffix} file does: it is damaged or has a wrong "
            "name; copy or download it again"
        )
    return _open_decompressed(path, compression)


def read_text(path: Path) -> str:
    """All of a file. Raises UserError."""
    with open_text(path) as file:
        return decode(file.read(), str(path))


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file. Raises UserError."""
    with open_text(path) as file:
        yield from enumerate(file, 1)


def is_empty(path: Path) -> bool:
    """Whether a file, decompressed, holds nothing."""
    size = path.stat().st_size
    if not size or size > _LARGEST_EMPTY:
        return not size
    return not _beginning(path)[0]


def content_checksum(path: Path) -> str:
    """sha256 of what a file holds, decompressed."""
    with _open_decompressed(path, _beginning(path)[1]) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def begins_as_html(path: Path) -> bool:
    """Whether the file is a web page."""
    return is_html(_beginning(path)[0])


def is_html(head: bytes) -> bool:
    """Whether text begins as a web page does."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return text.startswith((b"<!doctype html", b"<html"))


def _compression_of(head: bytes) -> _Compression | None:
    return next((kind for kind in _COMPRESSIONS if kind.begins.match(head)), None)


def _beginning(path: Path) -> tuple[bytes, _Compression | None]:
    """(the first bytes of what a file holds, its compression). Opens a plain file once."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    compression = _compression_of(head)
    if compression:
        with _open_decompressed(path, compression) as decompressed:
            head = decompressed.read(_HEAD)
    return head, compression


def _open_decompressed(path: Path, compression: _Compression | None) -> BinaryIO:
    if compression is None:
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, compression), _CHUNK)


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, all its members one after the other."""

    def __init__(self, path: Path, compression: _Compression) -> None:
        try:
            self._decompressor = compression.decompressor()
        except ImportError:
            extra = compression.name
            raise UserError(
                f"{path} is compressed with {extra}: pip install 'gptjax[{extra}]'"
            ) from None
        self._file = open(path, "rb")  # noqa: SIM115
        self._path, self._kind = path, compression
        self._rest = b""  # decompressed, and not yet read
        self._count = 0  # decompressed bytes so far

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):  # it has none where opening it failed
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = self._file.read(_CHUNK)
            if not chunk:
                if not self._decompressor.eof:
                    raise self._damaged("it ends too early")
                return 0
            self._rest = self._decompress(chunk)
            self._count += len(self._rest)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        try:
            while chunk:
                if self._decompressor.eof:
                    chunk = chunk.lstrip(b"\0")  # padding between members
                    if not chunk:
                        break
                    self._decompressor = self._kind.decompressor()
                parts.append(self._decompressor.decompress(chunk))
                chunk = self._decompressor.unused_data if self._decompressor.eof else b""
        except Exception as error:  # each library has its own
            raise self._damaged(str(error)) from None
        return b"".join(parts)

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self._path} is a damaged or incomplete {self._kind.name} file: {reason}, after "
            f"{self._count:,} bytes of text; copy or download it again"
        )


def _check_is_text(head: bytes, path: Path, compression: _Compression | None) -> None:
    """Raises UserError where a file begins as no text in UTF-8 does."""
    kind, fix = _recognise(head)
    if not kind:
        kind, fix = _utf16_without_mark(head)
    within = next((kind.name for kind in _COMPRESSIONS if kind.begins.match(head)), "")
    if compression and within:
        kind, fix = f"{within} within {compression.name}", "unpack it once"
    if not kind:
        return
    if fix.startswith("UTF"):
        source = f"{compression.tool} '{path}'" if compression else f"cat '{path}'"
        fix = f"convert it, such as with {source} | iconv -f {fix} -t UTF-8 > converted.txt"
    raise UserError(f"{path} is {kind}: {fix}")


def _recognise(head: bytes) -> tuple[str, str]:
    """(what a file is that begins so, a way out), of _NO_TEXT; or empty."""
    for at, magic, kind, fix in _NO_TEXT:
        if head[at:].startswith(magic):
            return kind, fix
    return "", ""


def describe_other(path: Path) -> str:
    """What a file is that is not what its reader expects, with a way out; "" where that is unknown.

    Such as "a pointer of Git LFS, not the file: run git lfs pull".
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if compression := _compression_of(head):
        return f"compressed with {compression.name}: unpack it with {compression.tool}"
    if is_html(head):
        return "a web page: was its download refused?"
    kind, fix = _recognise(head)
    return f"{kind}: {fix}" if kind and not fix.startswith("UTF") else ""


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _utf16_without_mark(head: bytes) -> tuple[str, str]:
    """(what it is, the encoding), or empty: ASCII in UTF-16 has a zero in every second byte."""
    zeros = [head[start::2].count(0) * 2 / max(len(head), 1) for start in (0, 1)]
    for (zeros_here, zeros_there), encoding in (
        (zeros, "UTF-16BE"),
        (zeros[::-1], "UTF-16LE"),
    ):
        if zeros_here > 0.4 and zeros_there < 0.1:
            return _UTF16, encoding
    return "", ""
