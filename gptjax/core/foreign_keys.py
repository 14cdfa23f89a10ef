"""Keys of files that other programs wrote: each is used, has no effect here, or is refused.

A `KeyTable` says it for one type of file, and `check` holds a file against it, so that nothing
foreign is ignored without a word. The tables stand beside the code that reads the file; the page
"Foreign files" of the reference is made from `KEY_TABLES` in `checkpoints/foreign_files.py`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.characters import shorten

log = logging.getLogger("gptjax")  # shown with --debug


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a key is refused, and the values of it that ask for nothing.

    reason: ends the message "KEY = VALUE is not supported: ...", with a way out where there is one.
    unless: values that change nothing; None is always one of them.
    """

    reason: str
    unless: tuple[Any, ...] = (False,)


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """What becomes of each key of one type of file.

    file: the type, as a heading ("config.json of Llama"). used: keys whose values are honoured.
    no_effect: {key: why it changes no number}. refused: {key: Refusal}. Keys may be patterns
    (`*_dropout`); exact names are looked up first. A key that is in no group is refused, unless
    its value is null.
    """

    file: str
    used: frozenset[str]
    no_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, Refusal] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _fates(self) -> dict[str, str | Refusal]:
        """{key or pattern: why it is refused or has no effect, "" for one that is used}."""
        others: dict[str, str | Refusal] = {**self.refused, **self.no_effect}
        # a chat template may read a key that is refused for others
        unused = {key: fate for key, fate in others.items() if key not in self.used}
        return {**dict.fromkeys(self.used, ""), **unused}

    def _fate(self, key: str) -> str | Refusal | None:
        """Of the key itself, or of the first pattern that it matches; None for an unknown one."""
        if key in self._fates:
            return self._fates[key]
        for pattern, fate in self._fates.items():
            if "*" in pattern and fnmatch.fnmatchcase(key, pattern):
                return fate
        return None

    def knows(self, key: str) -> bool:
        """Whether the key is in one of the groups."""
        return self._fate(key) is not None

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Refuses what cannot be honoured; lists what has no effect at --debug.

        where: the file, which begins the message. Raises UserError.
        """
        for key, value in values.items():
            if value is None:
                continue
            fate = self._fate(key)
            if fate is None:
                raise UserError(
                    f"{where}: the key {key!r} (= {_short(value)}) is not known here, and it could "
                    "change the results. If it has no effect on them, remove it from the file"
                )
            if isinstance(fate, str):
                if fate:
                    log.debug("%s: %s has no effect: %s", where, key, fate)
            elif _is_one_of(value, fate.unless):
                log.debug("%s: %s = %s asks for nothing", where, key, _short(value))
            else:
                raise UserError(f"{where}: {key} = {_short(value)} is not supported: {fate.reason}")


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Equality that tells False from 0 and True from 1."""
    return any(type(value) is type(other) and value == other for other in harmless)


def _short(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=str))
