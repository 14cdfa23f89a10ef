"""Which text is held out: named splits, the share of the text, what is on both sides."""

import dataclasses
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import make_config
from helpers import write_jsonl
from hypothesis import given, settings

from gptjax.config.build import from_stored
from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig, to_dict
from gptjax.core import files as core_files
from gptjax.data import held_out, inside, sources
from gptjax.data.readers import datasets
from gptjax.data.selection import describe
from gptjax.data.sources import EVAL, TRAIN


class Table(list):
    """What we use of a `datasets.Dataset`."""

    _fingerprint = ""

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        rows = Table({name: row[name] for name in names} for row in self)
        rows._fingerprint = self._fingerprint
        return rows


def table(name, count):
    rows = Table({"text": f"{name} {i}"} for i in range(count))
    rows._fingerprint = f"{name} {count}"
    return rows


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
    hub(monkeypatch)  # of one data set without splits all rows
    with pytest.raises(UserError, match="every document of x"):
        both(eval_path="elsewhere")


def test_a_folder_as_on_the_hub_has_its_splits(tmp_path, monkeypatch):
    package = pytest.importorskip("datasets")
    package.disable_progress_bars()
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d" / "data").mkdir(parents=True)
    for name, count in (("train", 20), ("test", 4)):
        write_jsonl(tmp_path / "d" / "data" / f"{name}-00000.jsonl", list(table(name, count)))
    config = DataConfig(source="datasets", path=str(tmp_path / "d"), eval_split="test")
    train, held = sides(sources.open_source(config))
    assert (len(train), held) == (20, [f"test {i}" for i in range(4)])
    with pytest.raises(UserError, match="no split 'tset': it has train, test"):
        sources.open_source(dataclasses.replace(config, eval_split="tset"))
    shutil.copytree(tmp_path / "d", tmp_path / "moved")
    moved = dataclasses.replace(config, path=str(tmp_path / "moved"))
    assert sources.open_source(moved).fingerprint == sources.open_source(config).fingerprint


def test_files_have_no_named_splits():
    for setting in ("eval_split", "train_split"):
        with pytest.raises(UserError, match=f"data.{setting} = 'test' names a split of tfds"):
            make_config(data={"source": "jsonl", "path": "x", setting: "test"})


def test_a_stored_config_with_the_former_default_is_read():
    stored = to_dict(make_config(data=dict(source="sotu")))
    stored["data"]["eval_split"] = "validation"
    assert from_stored(stored).data.eval_split == ""


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def open_text(path, **data):
    return sources.open_source(DataConfig(source="text", path=str(path), **data))


def sides(source):
    return list(source.documents(TRAIN)), list(source.documents(EVAL))


def said(source):
    return " ".join(source.selections["data"].held_out.lines())


def numbered(count, length):
    """Distinct documents of this many characters each."""
    return [f"{i:>{length}}" for i in range(count)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60_000), min_size=2, max_size=60),
    fraction=st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.4, 0.5]),
)
def test_the_share_that_is_asked_for_is_held_out(lengths, fraction):
    lengths = np.array([*lengths, 50_000])
    plan = held_out.plan_by_share(lengths, fraction)
    wanted = fraction * lengths.sum()
    assert abs(plan.characters(lengths) - wanted) <= held_out.TOLERANCE * wanted + len(lengths)
    by_count = held_out.plan_by_count(lengths, fraction)
    if abs(by_count.characters(lengths) - wanted) <= held_out.TOLERANCE * wanted:
        assert (plan.cuts == by_count.cuts).all()  # as in earlier versions
        assert not plan.rule


def test_two_files_give_their_ends(tmp_path):
    first, second = "".join(numbered(200, 10)), "".join(numbered(800, 11))
    source = open_text(write(tmp_path / "c", a=first, b=second), eval_fraction=0.1)
    train, ends = sides(source)
    assert [a + b for a, b in zip(train, ends, strict=True)] == [first, second]
    assert [len(end) for end in ends] == [200, 880]
    assert said(source) == "held out: 10 % (1,080 characters), the ends of 2 documents"
    # and of many documents those that come to the share
    many = write(tmp_path / "many", **{f"{i:02}": t for i, t in enumerate(numbered(19, 50))})
    source = open_text(many, eval_fraction=0.1)
    assert [len(side) for side in sides(source)] == [17, 2]
    assert "2 of 19 documents; no training document is the same" in said(source)


@pytest.mark.parametrize("name", ["long", "0"])  # after and before the short ones
def test_one_long_document_among_short_ones_gives_its_end(tmp_path, name):
    texts = {f"{i:03}": t for i, t in enumerate(numbered(300, 40))}
    texts[name] = "".join(numbered(9000, 8))
    source = open_text(write(tmp_path / "c", **texts), eval_fraction=0.1)
    train, ends = sides(source)
    assert len(train) == 301 - 30  # a tenth of the short ones is held out whole
    assert sorted(map(len, ends))[-2:] == [40, 7200]
    assert "the end of 1 document and 30 whole ones" in said(source)


def test_a_run_that_an_earlier_version_began_goes_on_with_its_split(tmp_path):
    path = write(tmp_path / "c", a="".join(numbered(20, 10)), b="".join(numbered(80, 11)))
    config = DataConfig(source="text", path=path)
    now = sources.open_source(config)
    earlier = core_files.digest(
        core_files.digest(*(core_files.sha256(tmp_path / "c" / f"{n}.txt") for n in "ab")),
        "text 0.1",
    )
    assert now.fingerprint != earlier
    again = sources.open_source(config, earlier)
    assert again.fingerprint == earlier
    assert [len(side) for side in sides(again)] == [1, 1]  # every second document
    assert "1 of 2 documents, as when this run began" in said(again)
    assert sources.open_source(config, now.fingerprint).fingerprint == now.fingerprint


def test_held_out_text_is_left_out_of_training_by_name(tmp_path):
    path = write(tmp_path / "c", a="one text", b="dev text", c="another", d="dev text.")
    (tmp_path / "dev.txt").symlink_to(tmp_path / "c" / "b.txt")
    for held in (tmp_path / "c" / "b.txt", tmp_path / "dev.txt"):
        source = open_text(path, eval_path=str(held))
        assert sides(source) == (["one text", "another", "dev text."], ["dev text"])
        assert "left out of training: 1 document with the content of held-out ones (b.txt)" in said(
            source
        )
    kept = open_text(path, eval_path=str(held), overlap="keep")
    assert len(sides(kept)[0]) == 4
    assert "warning: trained on: 1 document with" in said(kept)
    assert kept.fingerprint != source.fingerprint
    with pytest.raises(UserError, match=r"1 training document with .* \(b.txt\)"):
        open_text(path, eval_path=str(held), overlap="refuse")
    with pytest.raises(UserError, match=r"every document of .*\n.*eval_fraction.*overlap = 'keep'"):
        open_text(path, eval_path=path)
    # a run that an earlier version began goes on with what it trained on
    config = DataConfig(source="text", path=path, eval_path=str(held))
    assert len(sides(sources.open_source(config, kept.fingerprint))[0]) == 4


def lines(first, count):
    return "".join(f"this is line {i} of a text\n" for i in range(first, first + count))


def test_held_out_text_inside_longer_documents_is_refused(tmp_path):
    path = write(tmp_path / "c", a=lines(0, 100), b=lines(100, 5))
    own = write(tmp_path / "dev", dev=lines(40, 20))
    match = r"100 % of the held-out text of .*dev.* inside training documents, first a.txt"
    for overlap in ("drop", "refuse"):
        with pytest.raises(UserError, match=match):
            open_text(path, eval_path=own, overlap=overlap)
    kept = open_text(path, eval_path=own, overlap="keep")
    assert "warning: 100 % of the held-out text stands inside" in said(kept)


def test_a_little_held_out_text_inside_is_said(tmp_path, monkeypatch):
    path = write(tmp_path / "c", a=lines(100, 100), b=lines(300, 5))
    own = write(tmp_path / "dev", dev=lines(190, 4) + lines(400, 16), short="x\n" * 9)
    other = write(tmp_path / "other", dev=lines(500, 9))
    source = open_text(path, eval_path=own)
    said_of_lines = "warning: 19.4 % of the held-out text stands inside training documents, first"
    assert f"{said_of_lines} a.txt" in said(source)
    assert "stands inside" not in said(open_text(path, eval_path=other))
    monkeypatch.setattr(inside, "_compare", None)  # the second time it is in the cache
    assert said(open_text(path, eval_path=own)) == said(source)


def test_copies_within_the_data_are_left_out_too(tmp_path):
    rows = [{"text": f"row {i % 15}"} for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = DataConfig(source="jsonl", path=str(tmp_path / "a.jsonl"), eval_fraction=0.1)
    train, held = sides(sources.open_source(config))
    assert held == ["row 9", "row 4"]
    assert not set(train) & set(held)
    assert len(train) == 17
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the same"}] * 20)
    source = sources.open_source(config)
    assert [len(side) for side in sides(source)] == [18, 2]  # nothing else would be left
    assert "warning: trained on: 18 documents" in said(source)


def test_copies_of_a_document_whose_end_is_held_out_are_left_out(tmp_path):
    texts = [" ".join(str(1000 * i + k) for k in range(900)) for i in (*range(6), *range(6))]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    config = DataConfig(source="jsonl", path=str(tmp_path / "a.jsonl"), eval_fraction=0.02)
    source = sources.open_source(config)
    train, held = sides(source)
    assert held
    assert not [end for end in held if any(end in text for text in train)]
    assert "left out of training: 1 document with the content of held-out ones (record 7)" in said(
        source
    )


def test_a_separator_cuts_files_into_documents(tmp_path, capsys):
    text = "one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\n  three<|endoftext|>\n\n<|endoftext|>four"
    path = write(tmp_path / "c", a=text, b="five")
    options = {"eval_fraction": 0.0, "separator": "<|endoftext|>"}
    source = open_text(path, **options)
    assert sides(source)[0] == ["one\n", "two\r\n", "  three", "four", "five"]
    assert "1 blank between separators (a.txt part 4)" in " ".join(describe(source.selections))
    assert source.selections["data"].documents == 5
    assert open_text(path, eval_fraction=0.2, separator="\n").fingerprint != source.fingerprint
    with pytest.raises(UserError, match=r"'<eos>' stands nowhere in .* \(2 files\)"):
        open_text(path, separator="<eos>")
    capsys.readouterr()
    assert len(sides(open_text(path, eval_fraction=0.0))[0]) == 2
    assert "'<|endoftext|>' stands there 4 times" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data.separator = ',' cuts files of data.source = 'text'"):
        make_config(data=dict(source="jsonl", path="x", separator=","))
    with pytest.raises(UserError, match=r"no documents in it; check .* data.separator"):
        open_text(write(tmp_path / "blank", a="aaaa"), separator="a")


def test_nothing_held_out_is_said(tmp_path):
    path = write(tmp_path / "c", a="some text", b="other text")
    for fraction in (0.0, 0.001):
        source = open_text(path, eval_fraction=fraction)
        assert sides(source) == (["some text", "other text"], [])
        assert f"nothing (data.eval_fraction = {fraction:g} of 19 characters)" in said(source)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 5)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="is held out and has no text in its 5 documents"):
        sources.open_source(
            DataConfig(
                source="jsonl",
                path=str(tmp_path / "a.jsonl"),
                eval_path=str(tmp_path / "empty.jsonl"),
            )
        )


def test_a_damaged_survey_is_made_again(tmp_path, cache):
    path = write(tmp_path / "c", **dict(zip("abcdefgh", numbered(8, 70), strict=True)))
    before = sides(open_text(path, eval_fraction=0.25))
    surveys = set((cache / "surveys").iterdir())
    open_text(write(tmp_path / "other", a="another text"))
    (other,) = set((cache / "surveys").iterdir()) - surveys
    content = other.read_bytes()
    for damaged in (content, content[:40], b""):
        for survey in surveys:
            survey.write_bytes(damaged)
        assert sides(open_text(path, eval_fraction=0.25)) == before
