"""JSON objects as fields of records: one a line, in an array, or one after the other.

A number that Python would change (of thousands of digits, or too large for a float) stays the text
that the file has. A key that an object has twice is a problem of its field alone, see `Record`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.files import decode
from gptjax.data.readers.opening import is_html, read_lines, read_text
from gptjax.data.records import Record

_LONGEST_INTEGER = 4000  # digits; Python itself converts up to 4300
_SPACE = re.compile(r"[ \t\r\n]*")


def read_objects(path: Path) -> Iterator[Record]:
    """The objects of a file. Raises UserError."""
    if not _one_a_line(path):
        yield from _read_values(path)
        return
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            text = decode(line, where).strip()
            value, end = _parse(text, 0, path, number)
            if end < len(text):
                raise UserError(
                    f"{where} has more behind its object, at column {end + 1}: write one object "
                    f"a line, such as with jq -c . '{path}'"
                )
            yield _record(value, where)


def count_objects(path: Path) -> int:
    """Number of objects of a file; where each has a line, without parsing them."""
    if _one_a_line(path):
        return sum(1 for _, line in read_lines(path) if line.strip())
    return sum(1 for _ in _read_values(path))


def parse_object(path: Path) -> dict[str, Any]:
    """The object that is all of a file. Raises UserError."""
    value, _ = _parse(read_text(path), 0, path, 1)
    return _record(value, str(path)).fields


def _one_a_line(path: Path) -> bool:
    """Whether the first line that is not blank is one object; where it is nothing, too."""
    for number, line in read_lines(path):
        if line.strip():
            text = decode(line, f"{path}:{number}").strip()
            if text.startswith("["):
                return False
            try:
                return _FAST.raw_decode(text)[1] == len(text)
            except json.JSONDecodeError as error:
                return error.pos < len(text)  # else the object goes on in the next line
            except (_RepeatedKeyError, RecursionError):
                return True
    return True


def _read_values(path: Path) -> Iterator[Record]:
    """Objects of arrays, or one after the other, however they are laid out."""
    text = read_text(path)
    position, line = 0, 1
    in_array = False

    def skip_space(start: int) -> int:
        match = _SPACE.match(text, start)
        assert match
        return match.end()

    while (start := skip_space(position)) < len(text):
        line += text.count("\n", position, start)
        position = start
        if text[start] == "[" and not in_array:
            in_array, position = True, skip_space(start + 1)
        if in_array and text.startswith("]", position):
            in_array, position = False, position + 1
            continue
        value, end = _parse(text, position, path, line)
        line += text.count("\n", start, position)
        yield _record(value, f"{path}:{line}")
        line += text.count("\n", position, end)
        position = skip_space(end)
        line += text.count("\n", end, position)
        if in_array and text.startswith(",", position):
            position += 1
        elif in_array and not text.startswith("]", position):
            what = "breaks off" if position == len(text) else "has no comma between two values"
            raise UserError(f"{path}:{line} is not JSON: the array {what}")


def _json_word(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list"
    return "a text" if isinstance(value, str) else "a number"


def _record(value: Any, where: str) -> Record:
    """Raises UserError where the value is no object."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_json_word(value)}, not an object with fields")
    if not isinstance(value, _Repeated):
        return Record(where, value)
    problems = dict.fromkeys(value.names, "is there twice")
    for name, part in value.items():
        key = _key_that_is_there_twice(part)
        if key is not None:
            problems.setdefault(name, f"has the key {key!r} twice")
    return Record(where, {k: v for k, v in value.items() if k not in problems}, problems)


def _key_that_is_there_twice(value: Any) -> str | None:
    """Of an object within this value."""
    if isinstance(value, _Repeated) and value.names:
        return value.names[0]
    parts: list[Any] = []
    if isinstance(value, dict | list):
        parts = list(value.values()) if isinstance(value, dict) else value
    keys = (_key_that_is_there_twice(part) for part in parts)
    return next((key for key in keys if key is not None), None)


class _RepeatedKeyError(Exception):
    pass


class _Repeated(dict):
    """An object whose keys were counted. names: those that are there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _RepeatedKeyError
    return fields


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= _LONGEST_INTEGER else text


def _float(text: str) -> float | str:
    return float(text) if math.isfinite(float(text)) else text


_FAST = json.JSONDecoder(object_pairs_hook=_unrepeated, parse_int=_integer, parse_float=_float)
_COUNTING = json.JSONDecoder(object_pairs_hook=_Repeated, parse_int=_integer, parse_float=_float)


def _parse(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """(value, where it ends); `start` is in this line of the file. Raises UserError."""
    try:
        try:
            return _FAST.raw_decode(text, start)
        except _RepeatedKeyError:
            return _COUNTING.raw_decode(text, start)
    except RecursionError:
        raise UserError(f"{path}:{line} nests its lists and objects too deeply") from None
    except json.JSONDecodeError as error:
        if is_html(text[:200].encode(errors="replace")):
            raise UserError(
                f"{path} is a web page and not JSON: was its download refused?"
            ) from None
        line += text.count("\n", start, error.pos)
        column = error.pos - text.rfind("\n", 0, error.pos)
        hint = ""
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            hint = ": it breaks off there"
        elif text.startswith("'", error.pos):
            hint = ": JSON has double quotes"
        raise UserError(
            f"{path}:{line} is not JSON: {error.msg.removesuffix(' at')} at column {column}{hint}"
        ) from None
