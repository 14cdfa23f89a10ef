"""Records with named fields, whatever file they come from.

A reader in `gptjax/data/readers/` opens one split of a data set as `SplitRecords`; tasks make
examples of its records, and `gptjax.data.sources` makes documents of one of their fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from gptjax.config.errors import UserError
from gptjax.core.characters import SURROGATE
from gptjax.core.files import decode
from gptjax.data.selection import Selection

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Record:
    """One record.

    where: its place for error messages: file and line, or data set and row. problems: fields that
    the file has and that cannot be used, with the reason; it is said where one is asked for.
    """

    where: str
    fields: dict[str, Any]
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def value(self, name: str, *, setting: str) -> Any:
        """A field, or None. Raises UserError where the field is there and cannot be used."""
        if name in self.problems:
            raise UserError(f"{self.where}: {setting} = {name!r} {self.problems[name]}")
        return self.fields.get(name)

    def text(self, name: str, *, setting: str = "data.field") -> str:
        """A field as text; a list of texts is joined with spaces.

        setting: the setting that names the field, for error messages. Raises UserError where the
        field is missing or is no text.
        """
        value = self.value(name, setting=setting)
        if value is None and name in self.fields:
            raise UserError(f"{self.where}: {setting} = {name!r} is null; fill it or drop the row")
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            value = " ".join(value)
        if isinstance(value, bytes):
            value = decode(value, self.where)
        if not isinstance(value, str):
            raise UserError(
                f"{self.where} has no text under {setting} = {name!r}; "
                f"fields are {', '.join(map(str, self.fields))}{_records_within(self.fields)}"
            )
        if SURROGATE.search(value):
            raise UserError(
                f"{self.where}: {setting} = {name!r} holds half of a UTF-16 pair, which is no "
                "character; correct or drop the row"
            )
        return value


def _records_within(fields: Mapping[str, Any]) -> str:
    """A hint where one of the fields is a list of records."""
    for name, value in fields.items():
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            if "paragraphs" in value[0]:
                return "; SQuAD's form is read with data.source = 'squad'"
            return f"; {name!r} is a list of objects: for one record each, jq -c '.{name}[]'"
    return ""


@dataclasses.dataclass(frozen=True)
class SplitRecords:
    """The records of one split. `read()` gives the same records in the same order each time.

    read_fields: `read()` with the named fields only, where that spares reading the others.
    """

    count: int
    fingerprint: str  # a hash of the content
    read: Callable[[], Iterator[Record]]
    selection: Selection
    read_fields: Callable[[Collection[str]], Iterator[Record]] | None = None

    def read_only(self, names: Collection[str]) -> Iterator[Record]:
        """The records with these fields at least; of a table by columns, with no others."""
        return self.read_fields(names) if self.read_fields else self.read()


def missing_columns(names: Collection[str] | None, columns: Collection[str]) -> dict[str, str]:
    """Problems of the records that lack fields which were asked for."""
    lacking = [name for name in names or () if name not in columns]
    return dict.fromkeys(lacking, f"is not there; fields are {', '.join(columns)}")


def subsample_evenly(items: list[Item], limit: int) -> list[Item]:
    """`limit` of the items, evenly spread over the list; all of them where limit is 0."""
    if not limit or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def is_held_out(i: int, *, count: int, fraction: float) -> bool:
    """Whether record `i` of `count` is held out: every n-th is, with n = 1 / fraction."""
    if not (count and fraction):
        return False
    every = held_out_every(count, fraction)
    return i % every == every - 1


def held_out_every(count: int, fraction: float) -> int:
    """n, where every n-th of `count` records is held out."""
    return min(round(1 / fraction), count)
