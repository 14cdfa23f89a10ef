"""Which text is held out: the splits that a data set names."""

import pytest
from conftest import make_config

from gptjax.config.build import from_stored
from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig, to_dict
from gptjax.data import sources
from gptjax.data.readers import datasets
from gptjax.data.sources import EVAL, TRAIN


class Table(list):
    """What we use of a `datasets.Dataset`."""

    _fingerprint = "f"

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        return Table({name: row[name] for name in names} for row in self)


def table(name, count):
    return Table({"text": f"{name} {i}"} for i in range(count))


def hub(monkeypatch, *names, counts=20):
    """Makes the data set x of these splits; without names, it is not split."""
    splits = {name: table(name, counts) for name in names} if names else table("row", counts)
    monkeypatch.setattr(datasets, "_open_dataset", lambda config, path: splits)


def both(**data):
    source = sources.open_source(DataConfig(**{"source": "datasets", "name": "x", **data}))
    return list(source.documents(TRAIN)), list(source.documents(EVAL))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    hub(monkeypatch, "train", "test")
    assert len(both(eval_split="test")[1]) == 20
    for setting, name in (("eval_split", "tset"), ("train_split", "trian")):
        with pytest.raises(UserError, match=rf"no split '{name}': it has train, test.*{setting}"):
            both(**{setting: name})
    with pytest.raises(UserError, match="no split 'validation': it has train, test"):
        both(eval_split="validation")  # asked for by name
    assert len(both(eval_fraction=0.1)[1]) == 2  # and where it is not, some of train is held out
    hub(monkeypatch, "train", "validation", "test")
    assert both()[1] == [f"validation {i}" for i in range(20)]


def test_a_data_set_without_splits_takes_no_name_of_one(monkeypatch):
    hub(monkeypatch)
    train, held_out = both(eval_fraction=0.1)
    assert (len(train), len(held_out)) == (18, 2)
    for setting in ("eval_split", "train_split"):
        with pytest.raises(UserError, match=f"x has no splits, and data.{setting} = 'test' names"):
            both(**{setting: "test"})


def test_held_out_data_of_their_own_name_their_split(monkeypatch):
    hub(monkeypatch, "train", "test")
    with pytest.raises(UserError, match="has the splits train, test: name one with data"):
        both(eval_path="elsewhere")
    assert both(eval_path="elsewhere", eval_split="test")[1][0] == "test 0"


def test_files_have_no_named_splits():
    for setting in ("eval_split", "train_split"):
        with pytest.raises(UserError, match=f"data.{setting} = 'test' names a split of tfds"):
            make_config(data={"source": "jsonl", "path": "x", setting: "test"})


def test_a_stored_config_with_the_former_default_is_read():
    stored = to_dict(make_config(data=dict(source="sotu")))
    stored["data"]["eval_split"] = "validation"
    assert from_stored(stored).data.eval_split == ""
