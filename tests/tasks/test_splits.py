"""Rows of a task that are on both sides: left out of training, kept or refused."""

import pytest
from conftest import make_config
from helpers import write_jsonl

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.tasks.splits import read_splits

DEV = [{"id": "d", "text": "good", "label": "pos"}, {"id": "e", "text": "bad", "label": "neg"}]
TRAIN = [
    {"id": "1", "text": "fine", "label": "pos"},
    {"id": "2", "label": "pos", "text": "good"},  # of DEV, under another id
    {"id": "3", "text": "good", "label": "neg"},  # another label is another row
]


@pytest.fixture
def rows(tmp_path):
    """Reads the splits of train.jsonl and dev.jsonl."""
    write_jsonl(tmp_path / "train.jsonl", TRAIN)
    write_jsonl(tmp_path / "dev.jsonl", DEV)

    def read(resumed="", **data):
        base = {"source": "jsonl", "path": str(tmp_path / "train.jsonl")}
        base["eval_path"] = str(tmp_path / "dev.jsonl")
        config = make_config(data={**base, **data}, task=dict(name="classification"))
        return read_splits(config, resumed)

    return read


def ids(records):
    return [record.fields["id"] for record in records]


def said(splits):
    return " ".join(splits.selections["data"].held_out.lines())


def test_a_row_that_is_held_out_too_is_not_trained_on(rows, tmp_path):
    dropped = rows()
    assert (ids(dropped.train), ids(dropped.eval)) == (["1", "3"], ["d", "e"])
    assert "held out: 40 % (2 rows)" in said(dropped)
    assert "left out of training: 1 row with the content of held-out ones" in said(dropped)
    assert "train.jsonl:2)" in said(dropped)
    kept = rows(overlap="keep")
    assert ids(kept.train) == ["1", "2", "3"]
    assert kept.fingerprint != dropped.fingerprint
    # a run that an earlier version began goes on with the rows it had
    assert ids(rows(kept.fingerprint).train) == ["1", "2", "3"]
    assert ids(rows(dropped.fingerprint).train) == ["1", "3"]
    with pytest.raises(UserError, match=r"1 training row with .* \(.*train.jsonl:2\)"):
        rows(overlap="refuse")
    with pytest.raises(UserError, match=r"every row of data.path = .* is held out too"):
        rows(eval_path=str(tmp_path / "train.jsonl"))


def test_rows_of_a_mixture_are_compared_too(rows, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", [{"text": "bad", "label": "neg"}, TRAIN[0]])
    mixed = rows(mixture=[f"{tmp_path / 'more.jsonl'}=2"])
    assert [record.fields["text"] for record in mixed.train] == ["fine", "good", "fine", "fine"]


def test_splits_without_overlap_are_those_of_earlier_versions(rows, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TRAIN[::2])
    splits = rows()
    one, other = (
        files.digest("", files.sha256(tmp_path / f"{name}.jsonl")) for name in ("train", "dev")
    )
    assert splits.fingerprint == files.digest(one, "0.1", other)
    assert "no training row is the same as a held-out one" in said(splits)
