"""Files: the cache folder, atomic writes, checksums, what is set aside, and the lock of a workdir.

What only reports or saves time (records, caches) blocks nothing: `report_text` and `write_cached`
give up with a word, `read_cached` gives back whole content or nothing, and `set_aside` moves what
is damaged out of the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.streams import say, say_once

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ELOOP)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


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
    make_folder(path)
    return path


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it. One that is there will do; a file there is named."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename
        ) from None


def reason(error: BaseException) -> str:
    """An error in a line, such as `No space left on device`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or repr(error)).splitlines()[0][:300]


def explain(error: OSError) -> str:
    """What could not be read or written, why, and a way out."""
    path = str(error.filename or "input or output")
    lines = [f"{path}: {reason(error)}"]
    if error.errno in _NO_SPACE:
        if error.filename:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(_existing(Path(path))).free
                lines[0] += f" ({free / 2**20:,.1f} MiB free)"
        lines.append("Free some space and run the same command again.")
    elif error.errno == errno.EFBIG:
        lines[0] += " (a limit of this shell, see ulimit -f)"
        lines.append("Lift it with ulimit -f unlimited.")
    in_cache = Path(path).is_relative_to(cache_path())
    if in_cache and error.errno in (*_NO_SPACE, *_NO_WRITE):
        lines.append("Or name another folder for the cache: export GPTJAX_CACHE=FOLDER.")
    return "\n".join(lines)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames it to `path` if the block succeeds.

    So a reader never sees half a file. An OSError of the writing names `path`.
    """
    name = ""
    try:
        make_folder(path.parent)
        prefix = f".{path.name}."
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        os.close(handle)
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        if name and error.filename not in (None, name):  # another file, that the block reads
            raise
        raise OSError(error.errno, reason(error), str(path)) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file, atomically."""
    array = np.ascontiguousarray(array)  # the header says in which order the numbers stand
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # not by np.save, whose error on a full disk names neither disk nor file
        file.write(array.reshape(-1).view(np.uint8))


def report_text(path: Path, text: str) -> bool:
    """Whether a file that only reports was written; if not, that is said, once a file and reason.

    What is in its place and no file is set aside.
    """
    if os.path.isdir(path) or (os.path.islink(path) and not os.path.exists(path)):
        set_aside(path, "not a file")
    try:
        write_text(path, text)
    except OSError as error:
        say_once(f"warning: {path} could not be written: {reason(error)}; the run goes on without")
        return False
    return True


def set_aside(path: Path, why: str) -> bool:
    """Moves what is damaged to `damaged/` next to it, under its name and the time, and says so.

    False where it cannot be moved, which is said too.
    """
    target = place_for_damaged(path.parent, path.name)
    try:
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    except OSError as error:
        say(f"warning: {path}: {why}; it cannot be set aside: {reason(error)}")
        return False
    say(f"warning: {path}: {why}; set aside as {target}")
    return True


def place_for_damaged(folder: Path, name: str) -> Path:
    """A path in `folder/damaged/` that is free: the name and the time."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6}"
    return folder / "damaged" / f"{name}-{stamp}"


def read_cached(path: Path) -> bytes | None:
    """What `write_cached` wrote, or None where it is missing or damaged (then it is set aside)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        set_aside(path, reason(error))
        return None
    checksum, data = content[:64], content[64:]
    if digest(data).encode() == checksum:
        return data
    set_aside(path, "damaged")
    return None


def write_cached(path: Path, data: bytes) -> bool:
    """Whether the data is in the cache, with its checksum; if not, that is said once a folder."""
    try:
        write_bytes(path, digest(data).encode() + data)
    except OSError as error:
        say_uncached(path.parent, error)
        return False
    return True


def say_uncached(folder: Path, error: OSError) -> None:
    """Says, once, that a cache cannot be used."""
    say_once(
        f"warning: {folder} cannot be written ({reason(error)}): it goes without this cache, and "
        "the next start takes longer; GPTJAX_CACHE names another folder"
    )


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
    marker = cache_path("verified", key[:32])
    if os.path.lexists(marker):
        return True
    if sha256(path) != expected:
        return False
    with contextlib.suppress(OSError):  # then it is read again next time
        marker.parent.mkdir(parents=True, exist_ok=True)
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
    path = folder / ".lock"
    make_folder(folder)
    if os.path.lexists(path) and not os.path.isfile(path):
        set_aside(path, "not a file")
    with open(path, "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{folder} is in use by another run: {holder}\n"
                "Wait for it, stop it, or pick another --workdir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"warning: {folder}: its disk has no locks; nothing keeps a second run out")
        this_process = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        with contextlib.suppress(OSError):  # a full disk: who holds it is then unknown
            file.truncate(0)
            file.write(json.dumps(this_process).encode())
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
