"""SQuAD's nested JSON as flat records.

Fields: id, title, context, question, answers (a list of texts, empty where the question has no
answer) and answer (the first of them).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.data.readers.files import records_of_files
from gptjax.data.readers.finding import find_files
from gptjax.data.readers.json_objects import parse_object
from gptjax.data.records import Record, SplitRecords


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """Raises UserError where a file does not have this form."""
    input_files = find_files(path, (".json",), keep_duplicates=config.duplicates == "keep")

    def read() -> Iterator[Record]:
        for p in input_files.paths:
            content = parse_object(p)
            try:
                yield from _flatten(content, p)
            except (KeyError, TypeError, IndexError) as error:
                raise UserError(
                    f"{p} is not in SQuAD's form: {type(error).__name__} {error} "
                    "(data / paragraphs / qas / answers / text)"
                ) from None

    return records_of_files(input_files, read)


def _flatten(content: dict[str, Any], path: Path) -> Iterator[Record]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                fields = {
                    "id": qa["id"],
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": answers,
                    "answer": answers[0] if answers else "",
                }
                yield Record(f"{path} question {qa['id']}", fields)
