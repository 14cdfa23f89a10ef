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
from gptjax.data.readers.opening import (
    COMPRESSED,
    content_checksum,
    is_empty,
    with_compression,
)
from gptjax.data.selection import COPIES, Selection, passed_over, say_passed_over

_EDITOR_COPIES = ("*~", "#*#", "*.bak", "*.orig", "*.swp", "*.swo")
_MAGIC = "*?["  # characters that make a path a glob


@dataclasses.dataclass(frozen=True)
class Files:
    """Files to read, sorted, with their checksums, and what was passed over on the way."""

    paths: list[Path]
    checksums: list[str]
    selection: Selection


def find_files(
    path: str,
    suffixes: Sequence[str],
    *,
    compressed: bool = True,
    keep_duplicates: bool = False,
    second_choice: Sequence[str] = (),
) -> Files:
    """The files of a file name, a folder or a glob.

    suffixes: in lower case; compressed: those with a compression's suffix behind them too.
    keep_duplicates: files with equal content are all taken, and not the first alone.
    second_choice: suffixes of a folder that has none of the others.

    Raises UserError where no file is left, or where a folder or file cannot be read.
    """
    root = Path(path).expanduser()
    choices = [tuple(suffixes), tuple(second_choice)]
    if compressed:
        choices = [with_compression(choice) for choice in choices]
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    try:
        if root.is_dir():
            paths = _in_folder(root, choices, left_out)
        elif root.exists():
            paths = [files.require_regular_file(root)]
        else:
            root, patterns = _split_glob(root)
            paths = list(_walk(root, patterns, left_out)) if patterns and root.is_dir() else []
        paths, checksums = _without_copies(root, sorted(paths), left_out, keep_duplicates)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    entries = passed_over(left_out)
    if not paths:
        raise UserError(_no_files(path, [*suffixes, *second_choice], say_passed_over(entries)))
    size = sum(p.stat().st_size for p in paths)
    return Files(paths, checksums, Selection(path, len(paths), size, 0, entries))


def listed_files(name: str, paths: list[Path]) -> Files:
    """Files that are known, in their order. name: of the data set that they are."""
    size = sum(p.stat().st_size for p in paths)
    return Files(paths, [files.sha256(p) for p in paths], Selection(name, len(paths), size))


def _no_files(path: str, suffixes: Sequence[str], left_out: str) -> str:
    if Path(path).expanduser().is_file():
        return f"{path} is empty"
    patterns = " ".join(f"*{suffix}" for suffix in suffixes)
    if left_out:
        return f"{path}: no file to read there ({patterns}); passed over {left_out}"
    return (
        f"{path!r}: no file there (looking for {patterns}); the working directory is {Path.cwd()}"
    )


def _in_folder(
    root: Path, choices: Sequence[tuple[str, ...]], left_out: dict[str, list[str]]
) -> list[Path]:
    """Files below a folder with one of the first choice of suffixes, or else of the next."""
    paths = list(_walk(root, ("**",), left_out))
    for suffixes in choices:
        taken = [p for p in paths if p.name.lower().endswith(suffixes)]
        if taken:
            break
    left_out["of another suffix"] += [_name(p, root) for p in set(paths) - set(taken)]
    return taken


def _split_glob(path: Path) -> tuple[Path, tuple[str, ...]]:
    """(the folder that a glob begins in, the rest); no rest where the path is no glob."""
    for i, part in enumerate(path.parts):
        if any(character in part for character in _MAGIC):
            return Path(*path.parts[:i]), path.parts[i:]
    return path, ()


def _walk(root: Path, patterns: tuple[str, ...], left_out: dict[str, list[str]]) -> Iterator[Path]:
    """Regular files below a folder whose relative path matches, through links too.

    Linked folders come last, so that a folder is read under its own name where it has one here.
    """
    folders: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    links: list[tuple[Path, tuple[str, ...]]] = []
    seen = set()
    while folders or links:
        folder, folder_parts = folders.pop() if folders else links.pop(0)
        place = os.path.realpath(folder)
        if place in seen:
            left_out["second names of a folder"].append("/".join(folder_parts))
            continue
        seen.add(place)
        for name in _names_in(folder, folder_parts, left_out):
            p, parts = folder / name, (*folder_parts, name)
            is_folder, fault = _kind(p)
            is_wanted = (_may_hold if is_folder else _matches)(parts, patterns)
            if is_folder and not is_wanted and _matches(parts, patterns):
                fault, is_wanted = "folders that the pattern matches (add /**)", True
            if not is_wanted:
                continue
            fault = _left_alone(name, patterns) or fault
            if fault:
                left_out[fault].append("/".join(parts))
            elif not is_folder:
                yield p
            else:
                (links if p.is_symlink() else folders).append((p, parts))


def _names_in(folder: Path, parts: tuple[str, ...], left_out: dict[str, list[str]]) -> list[str]:
    """What is in a folder; nothing of one below the first that may not be read."""
    try:
        return sorted(os.listdir(folder))
    except PermissionError:
        if not parts:
            raise
        left_out["folders that may not be read"].append("/".join(parts))
        return []


def _kind(path: Path) -> tuple[bool, str]:
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
    root: Path, paths: list[Path], left_out: dict[str, list[str]], keep_duplicates: bool
) -> tuple[list[Path], list[str]]:
    """(the files without empty ones and second copies, their checksums)."""
    plain_names = collections.Counter(_without_compression(p) for p in paths)
    first_of: dict[str, Path] = {}
    taken = []
    for p in paths:
        if is_empty(p):
            left_out["empty"].append(_name(p, root))
            continue
        checksum = content = files.sha256(p)
        if plain_names[_without_compression(p)] > 1:  # a.txt and a.txt.gz
            content = content_checksum(p)
        first = first_of.setdefault(content, p)
        if first is p or keep_duplicates:
            taken.append((p, checksum))
        else:
            left_out[COPIES].append(f"{_name(p, root)} = {first.name}")
    return [p for p, _ in taken], [checksum for _, checksum in taken]


def _without_compression(path: Path) -> str:
    name = str(path)
    return name[: -len(path.suffix)] if name.lower().endswith(COMPRESSED[1:]) else name


def _name(path: Path, root: Path) -> str:
    """The path below the folder or glob that was named."""
    return path.name if path == root else str(path.relative_to(root))
