"""Held-out text that stands inside training documents which are longer, found by its lines.

Documents that are equal are compared by hash (`held_out.py`). A held-out file that is a part of a
training file equals none; its lines stand there all the same.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core import cli, files
from gptjax.data.documents import Documents
from gptjax.data.selection import NAMES

_SHORTEST_LINE = 20  # characters: shorter ones, such as headings, repeat by chance
_MOST = 0.5  # from this share on, an evaluation would mostly measure what was learned by heart


class Inside(NamedTuple):
    """share: of the characters held out, those in lines that are also trained on. names: of the
    first training documents with such lines.
    """

    share: float
    names: tuple[str, ...]


def find_inside(main: Documents, own: Documents, left_out: np.ndarray) -> Inside:
    """Compares the lines of held-out documents of their own with those of training documents.

    left_out: bool [n], training documents that do not count. Reads both once; kept in the cache.
    """
    digest = files.digest("inside 2", main.fingerprint, own.fingerprint, left_out.tobytes().hex())
    path = files.cache_path("surveys", f"{digest[:32]}.json")
    if data := files.read_cached(path):
        share, numbers = json.loads(data)
    else:
        share, numbers = _compare(main, own, left_out)
        files.write_cached(path, json.dumps([share, numbers]).encode())
    return Inside(share, tuple(main.name(number) for number in numbers))


def _compare(main: Documents, own: Documents, left_out: np.ndarray) -> tuple[float, list[int]]:
    """(share, numbers of the first training documents with such lines)."""
    characters: Counter[str] = Counter()  # of each long line, in all its occurrences
    total = 0
    for text in own.read():
        total += len(text)
        for line in text.splitlines():
            if len(line) >= _SHORTEST_LINE:
                characters[line] += len(line) + 1  # with its end
    found: set[str] = set()
    numbers: list[int] = []
    with cli.progress("documents compared with held-out lines", main.count) as advance:
        for number, text in enumerate(main.read()):
            if not left_out[number] and len(text) >= _SHORTEST_LINE:
                common = characters.keys() & set(text.splitlines())
                found |= common
                if common and len(numbers) < NAMES:
                    numbers.append(number)
            advance(1)
    return min(sum(characters[line] for line in found) / max(total, 1), 1.0), numbers


def check_inside(config: DataConfig, inside: Inside, where: str) -> None:
    """Refuses an evaluation on text that is mostly trained on. Raises UserError."""
    if inside.share < _MOST or config.overlap == "keep":
        return
    raise UserError(
        f"{100 * inside.share:.3g} % of the held-out text of {where} stands inside training "
        f"documents, first {', '.join(inside.names)}:\n"
        "take it out of them, leave data.eval_path and data.eval_split out to hold out a share "
        "(data.eval_fraction), or set data.overlap = 'keep'"
    )
