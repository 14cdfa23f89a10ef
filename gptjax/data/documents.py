"""Documents of a path or split, as they are read: what sources give and splits are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from gptjax.data.selection import Selection


@dataclasses.dataclass(frozen=True)
class Documents:
    """`count` documents in a fixed order. fingerprint: of their content. name: of one by number."""

    count: int
    fingerprint: str
    read: Callable[[], Iterator[str]]
    selection: Selection
    name: Callable[[int], str]
