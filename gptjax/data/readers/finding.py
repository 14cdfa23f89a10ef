"""Finding the files that `data.path` names, with what was passed over and why.

A file that is named is always taken. In a folder those with a known suffix are, in any case, with
the folders below and those that links lead to. A glob takes what matches. Neither takes what is
hidden (.git, ._a.txt), copies that editors leave (a.txt~), empty files, and second copies of a
file.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.data.selection import Selection, passed_over, say_passed_over

COMPRESSED = ("", ".gz")  # after the suffix of any format of text
_EDITOR_COPIES = ("*~", "#*#", "*.bak", "*.orig", "*.swp", "*.swo")
_MAGIC = "*?["  # characters that make a path a glob


@dataclasses.dataclass(frozen=True)
class Files:
    """Files to read, sorted, with their checksums, and what was passed over on the way."""

    paths: list[Path]
    checksums: list[str]
    selection: Selection


def find_files(
    path: str, suffixes: Sequence[str], *, compressed: bool = True, keep_duplicates: bool = False
) -> Files:
    """The files of a file name, a folder or a glob.

    suffixes: in lower case; compressed: those with a compression's suffix behind them too.
    keep_duplicates: files with equal content are all taken, and not the first alone. Raises
    UserError where no file is left, or where a folder or file cannot be read.
    """
    root = Path(path).expanduser()
    if compressed:
        suffixes = [suffix + ending for suffix in suffixes for ending in COMPRESSED]
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    try:
        if root.is_dir():
            paths = _in_folder(root, tuple(suffixes), left_out)
        elif root.exists():
            paths = [files.require_regular_file(root)]
        else:
            paths = _matching(root, left_out)
        paths, checksums = _without_copies(sorted(paths), left_out, keep_duplicates)
    except OSError as error:
        raise UserError(f"data.path = {path!r}: {error.filename}: {error.strerror}") from None
    entries = passed_over(left_out)
    if not paths:
        raise UserError(_no_files(path, suffixes, say_passed_over(entries)))
    size = sum(p.stat().st_size for p in paths)
    return Files(paths, checksums, Selection(path, len(paths), size, 0, entries))


def listed_files(name: str, paths: list[Path]) -> Files:
    """Files that are known, in their order. name: of the data set that they are."""
    size = sum(p.stat().st_size for p in paths)
    return Files(paths, [files.sha256(p) for p in paths], Selection(name, len(paths), size))


def _no_files(path: str, suffixes: Sequence[str], left_out: str) -> str:
    if left_out:
        return f"data.path = {path!r}: no file to read there; passed over {left_out}"
    patterns = " ".join(f"*{suffix}" for suffix in suffixes if not suffix.endswith(COMPRESSED[1:]))
    return (
        f"data.path = {path!r}: no file there (looking for {patterns}); "
        f"the working directory is {Path.cwd()}"
    )


def _in_folder(root: Path, suffixes: tuple[str, ...], left_out: dict[str, list[str]]) -> list[Path]:
    paths = []
    for p in _walk(root, ("**",), left_out):
        if p.name.lower().endswith(suffixes):
            paths.append(p)
        else:
            left_out["of another suffix"].append(str(p.relative_to(root)))
    return paths


def _matching(pattern: Path, left_out: dict[str, list[str]]) -> list[Path]:
    """The files of a glob; none where the path has no magic characters."""
    is_magic = [any(c in part for c in _MAGIC) for part in pattern.parts]
    if not any(is_magic):
        return []
    first = is_magic.index(True)
    root, patterns = Path(*pattern.parts[:first]), pattern.parts[first:]
    if not root.is_dir():
        return []
    return list(_walk(root, patterns, left_out))


def _walk(root: Path, patterns: tuple[str, ...], left_out: dict[str, list[str]]) -> Iterator[Path]:
    """Regular files below a folder whose relative path matches, through links too.

    Linked folders come last, so that a folder is read under its own name where it has one here.
    """
    folders, links = [root], list[Path]()
    seen = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        place = os.path.realpath(folder)
        if place in seen:
            left_out["second names of a folder"].append(str(folder.relative_to(root)))
            continue
        seen.add(place)
        for name in sorted(os.listdir(folder)):
            p = folder / name
            relative = p.relative_to(root)
            is_folder, fault = _kind(p, root)
            is_wanted = (_may_hold if is_folder else _matches)(relative.parts, patterns)
            if is_folder and not is_wanted and _matches(relative.parts, patterns):
                fault, is_wanted = "folders that the pattern matches (add /**)", True
            if not is_wanted:
                continue
            fault = _left_alone(name, patterns) or fault
            if fault:
                left_out[fault].append(str(relative))
            elif not is_folder:
                yield p
            else:
                (links if p.is_symlink() else folders).append(p)


def _kind(path: Path, root: Path) -> tuple[bool, str]:
    """(whether it is a folder, why it cannot be read or "")."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return False, "broken links"
    if stat.S_ISDIR(mode):
        target = os.path.realpath(path)
        is_loop = path.is_symlink() and Path(os.path.realpath(path.parent)).is_relative_to(target)
        return True, "links to a folder above" if is_loop else ""
    return False, "" if stat.S_ISREG(mode) else "pipes or devices"


def _left_alone(name: str, patterns: tuple[str, ...]) -> str:
    """Why a name is not taken unless a part of the pattern asks for such names, or ""."""
    if any(_private(pattern) and fnmatchcase(name, pattern) for pattern in patterns):
        return ""
    return _private(name)


def _private(name: str) -> str:
    if name.startswith("."):
        return "hidden"
    return "editor copies" if any(fnmatchcase(name, copy) for copy in _EDITOR_COPIES) else ""


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a relative path matches a glob; ** is any number of folders, or all files."""
    if not patterns:
        return not parts
    if patterns == ("**",):
        return True
    if patterns[0] == "**":
        return any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _may_hold(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether files below this folder may match."""
    for part, pattern in zip(parts, patterns, strict=False):
        if pattern == "**":
            return True
        if not fnmatchcase(part, pattern):
            return False
    return len(parts) < len(patterns)


def _without_copies(
    paths: list[Path], left_out: dict[str, list[str]], keep_duplicates: bool
) -> tuple[list[Path], list[str]]:
    """(the files without empty ones and second copies, their checksums)."""
    first_of: dict[str, Path] = {}
    taken = []
    for p in paths:
        if not p.stat().st_size:
            left_out["empty"].append(p.name)
            continue
        checksum = files.sha256(p)
        first = first_of.setdefault(checksum, p)
        if first is p or keep_duplicates:
            taken.append((p, checksum))
        else:
            left_out["copies of another file"].append(f"{p.name} = {first.name}")
    return [p for p, _ in taken], [checksum for _, checksum in taken]
