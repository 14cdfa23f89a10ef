"""Parallel text files: line n of each file belongs to record n.

Such as data.path = train.en,train.de with data.columns = en,de.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core.files import decode
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import find_files, listed_files
from gptjax.data.readers.opening import read_lines
from gptjax.data.records import Record, SplitRecords


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Raises UserError where the files have different numbers of lines."""
    parts = [find_files(part, (".txt",)) for part in path.split(",")]
    for part in parts:
        if len(part.paths) > 1:
            raise UserError(
                f"data.path: {part.selection.path!r} is {len(part.paths)} files, such as "
                f"{part.paths[1]}; name one file for each field"
            )
    paths = [part.paths[0] for part in parts]
    names = config.columns
    if len(paths) != len(names):
        raise UserError(
            f"data.path names {len(paths)} files and data.columns = {list(names)} "
            f"{len(names)} fields: one name a file"
        )

    def read() -> Iterator[Record]:
        streams = [read_lines(p) for p in paths]
        number = 0
        while True:
            number += 1
            lines = [next(stream, None) for stream in streams]
            ended = [p for p, line in zip(paths, lines, strict=True) if line is None]
            if len(ended) == len(paths):
                return
            if ended:
                raise UserError(
                    f"{ended[0]} ends before line {number}, which {paths[0]} or another file "
                    "still has: they are not parallel"
                )
            fields = {}
            for name, p, line in zip(names, paths, lines, strict=True):
                assert line is not None
                fields[name] = decode(line[1], f"{p}:{number}").rstrip("\r\n")
            yield Record(f"{paths[0]}:{number}", fields)

    return records_of_files(listed_files(path, paths), read, settings=json.dumps(names))
