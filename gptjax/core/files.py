"""Files: the cache folder, atomic writes, checksums, and the lock of a workdir."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError


def cache_path(*parts: str) -> Path:
    """A path in `$GPTJAX_CACHE`, else `$XDG_CACHE_HOME/gptjax`, else `~/.cache/gptjax`."""
    root = os.environ.get("GPTJAX_CACHE")
    if not root:
        user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(user_cache, "gptjax")
    return Path(root, *parts)


def cache_dir(*parts: str) -> Path:
    """The folder `cache_path`, created."""
    path = cache_path(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames it to `path` if the block succeeds.

    So a reader never sees half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def require_regular_file(path: Path) -> Path:
    """`path` if it is a regular file, else UserError: a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, with the path."""
    try:
        content = json.loads(require_regular_file(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:150]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def sha256(path: Path) -> str:
    """The file's checksum, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path, expected: str) -> bool:
    """Whether the file has this sha256.

    A file that matched is remembered, by path, size and time of change, and is not read again.
    """
    status = path.stat()
    key = digest(str(path.resolve()), str(status.st_size), str(status.st_mtime_ns), expected)
    marker = cache_dir("verified") / key[:32]
    if not marker.exists():
        if sha256(path) != expected:
            return False
        marker.touch()
    return True


def digest(*parts: str | bytes) -> str:
    """sha256 of the parts, each with its length so that no two lists of parts collide."""
    result = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `folder/.lock` for this process. The kernel releases it when the process dies.

    If another process holds it, raises UserError with its host and pid, or waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{folder} is in use by another run: {holder}\n"
                "Wait for it, stop it, or pick another --workdir."
            ) from None
        file.truncate(0)
        this_process = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        file.write(json.dumps(this_process))
        file.flush()
        yield


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text, a byte order mark left out. Raises UserError with the first wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        if error.reason == "unexpected end of data":
            raise UserError(
                f"{wrong} begins a character and ends the text: is it cut off?"
            ) from None
        around = data[max(error.start - 12, 0) : error.start + 12].decode("latin-1")
        raise UserError(
            f"{wrong}, which is {around!r} in Latin-1; convert it, such as with "
            "iconv -f LATIN1 -t UTF-8"
        ) from None
