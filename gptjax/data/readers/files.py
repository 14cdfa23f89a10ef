"""What readers of files share: how found files and a function that reads them become records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from gptjax.core import files
from gptjax.data.readers.finding import Files
from gptjax.data.records import Record, SplitRecords


def records_of_files(
    input_files: Files,
    read: Callable[[], Iterator[Record]],
    *,
    settings: str = "",
    count: int | None = None,
) -> SplitRecords:
    """The records that `read()` gives of these files.

    settings: what else decides the records, for the fingerprint. count: number of records where
    it is known without reading them.
    """
    if count is None:
        count = sum(1 for _ in read())
    selection = dataclasses.replace(input_files.selection, documents=count)
    return SplitRecords(count, files.digest(settings, *input_files.checksums), read, selection)
