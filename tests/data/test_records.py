"""Records of every format: the same rows, and wrong files named with the line."""

import csv
import json

import pytest
from helpers import write_jsonl

from gptjax.config import build
from gptjax.config.errors import UserError
from gptjax.data import sources


def read(source, path, **data):
    config = build.build_config({"data": {"source": source, "path": str(path), **data}}).data
    return list(sources.read_records(config, str(path), "train").read())


def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    records = [
        {"text": 'a "quoted", line\nof two', "label": "x"},
        {"text": "été 東京", "label": "y"},
    ]
    write_jsonl(tmp_path / "a.jsonl", records)
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    rows = [
        [r.fields for r in read(kind, tmp_path / f"a.{kind}")]
        for kind in ("jsonl", "csv", "parquet")
    ]
    assert rows == [records] * 3


def test_tabs_parallel_lines_and_squad(tmp_path):
    (tmp_path / "a.tsv").write_text('Say "hi\tSag "hallo\textra\nTwo\tZwei\n')
    rows = read("csv", tmp_path / "a.tsv", columns=["en", "de"])
    assert [r.fields for r in rows] == [
        {"en": 'Say "hi', "de": 'Sag "hallo'},
        {"en": "Two", "de": "Zwei"},
    ] and rows[1].where.endswith("a.tsv:2")
    (tmp_path / "x.en").write_text("one\ntwo\n")
    (tmp_path / "x.de").write_text("eins\nzwei\n")
    pair = f"{tmp_path}/x.en,{tmp_path}/x.de"
    assert [r.fields for r in read("lines", pair, columns=["en", "de"])] == [
        {"en": "one", "de": "eins"},
        {"en": "two", "de": "zwei"},
    ]
    qas = [
        {
            "id": "q1",
            "question": "Who?",
            "answers": [{"text": "Ada", "answer_start": 0}, {"text": "Ada L.", "answer_start": 0}],
        }
    ]
    (tmp_path / "s.json").write_text(
        json.dumps(
            {"data": [{"title": "t", "paragraphs": [{"context": "Ada wrote it.", "qas": qas}]}]}
        )
    )
    (row,) = read("squad", tmp_path / "s.json")
    assert (
        row.fields["answers"] == ["Ada", "Ada L."]
        and row.fields["answer"] == "Ada"
        and "q1" in row.where
    )


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"bytes.jsonl:2 is not UTF-8"):
        read("jsonl", tmp_path / "bytes.jsonl")
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match=r"short.csv:3 has 1 fields and there are 2 columns"):
        read("csv", tmp_path / "short.csv")
    (tmp_path / "long.csv").write_text("text,label\nI liked it, really,pos\n")
    with pytest.raises(
        UserError,
        match=r"long.csv:2 has 3 fields and there are 2 columns: text, label; "
        "text with commas stands in quotes",
    ):
        read("csv", tmp_path / "long.csv")
    (tmp_path / "a.txt").write_text("1\n2\n")
    (tmp_path / "b.txt").write_text("1\n")
    with pytest.raises(UserError, match=r"b.txt ends before line 2"):
        read("lines", f"{tmp_path}/a.txt,{tmp_path}/b.txt", columns=["a", "b"])
    (tmp_path / "s.json").write_text('{"data": [{"title": "x"}]}')
    with pytest.raises(UserError, match=r"s.json is not in SQuAD's form"):
        read("squad", tmp_path / "s.json")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"p.parquet is not a complete parquet file"):
        read("parquet", tmp_path / "p.parquet")
