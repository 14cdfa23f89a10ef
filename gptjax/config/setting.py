"""How one setting is declared: its default, what it means, and the values that it may have."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


def setting(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    table: str = "",
    shapes: bool = True,
    auto: Any = None,
) -> Any:
    """One setting. `low` and `high` are inclusive; `shapes=False` marks what may change on resume.

    table: "module:TABLE", whose rows are the choices in addition to the default (see `load_table`).
    auto: the value that leaves the choice to the run: a run that goes on may come from it or turn
    to it, whatever was chosen.
    """
    metadata = {
        "meaning": meaning,
        "low": low,
        "high": high,
        "choices": choices,
        "table": table,
        "shapes": shapes,
        "auto": auto,
    }
    return dataclasses.field(default=default, metadata=metadata)


def load_table(name: str) -> dict[str, Any]:
    """The dict literal that "module:TABLE" names.

    It stands next to its users, in a folder that imports this one, so it is read when a config
    is built and not before: a new row there is a new choice, and nothing is edited here.
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def choices_of(field: dataclasses.Field) -> tuple[Any, ...]:
    """The values that a setting may have; () where they are not a list of names."""
    if not field.metadata["table"]:
        return field.metadata["choices"]
    names = list(load_table(field.metadata["table"]))
    if isinstance(field.default, str) and field.default not in names:
        names.insert(0, field.default)  # "" for none
    return tuple(names)
