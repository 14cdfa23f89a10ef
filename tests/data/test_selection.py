"""What was taken and left out is said: at the start, in previews, in reports, beside shards."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import make_config

from gptjax.config import build, schema
from gptjax.core import files
from gptjax.data import preview, shards, sources
from gptjax.data.selection import Selection
from gptjax.tasks import loading, splits
from gptjax.tokenizer.trained import ByteTokenizer
from gptjax.training import report, setup


@pytest.fixture
def folder(tmp_path):
    """Four documents, and what is passed over."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(4):
        (corpus / f"{i}.txt").write_text(f"document {i} of the corpus\n" * 20)
    (corpus / "copy of 2.txt").write_text((corpus / "2.txt").read_text())
    (corpus / "none.txt").write_text("")
    (corpus / "a.pdf").write_text("%PDF")
    (corpus / ".DS_Store").write_text("x")
    return corpus


def lines(folder):
    return [
        f"data: {folder}: 4 files of 2 KB, 4 documents",
        (
            "data: passed over 1 copies of another file (copy of 2.txt = 2.txt), "
            "1 empty (none.txt), 1 hidden (.DS_Store), 1 of another suffix (a.pdf)"
        ),
    ]


def config_for(path, **data):
    return make_config(
        data=dict(source="text", path=str(path), eval_fraction=0.25, **data),
        model=dict(context=32),
    )


def test_a_run_says_what_it_took_also_from_the_cache(folder, capsys):
    config = config_for(folder)
    for _ in range(2):
        prepared = shards.ensure(config)
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if line.startswith("data: ")] == lines(folder)
    assert prepared.summary() == (
        "training 1,503 tokens (3 documents); held out 501 tokens (1 document)"
    )
    (folder / "b.pdf").write_text("%PDF")  # the documents are the same, and are in the cache
    assert shards.ensure(config).selections["data"].passed_over[0].count == 2
    assert "2 of another suffix (a.pdf, b.pdf)" in capsys.readouterr().err


def test_prepared_shards_say_what_they_were_made_of(folder, tmp_path, capsys):
    shards.prepare(config_for(folder), tmp_path / "out")
    capsys.readouterr()
    config = build.build_config({"data": {"source": "shards", "path": str(tmp_path / "out")}})
    prepared = shards.ensure(config)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("data: ")] == lines(folder)
    stored = json.loads((tmp_path / "out" / "meta.json").read_text())["selections"]
    taken = prepared.selections["data"]
    assert Selection.from_json(json.loads(json.dumps(stored))["data"]) == taken
    assert dataclasses.asdict(taken)["size"] == 4 * 500
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    del meta["selections"]  # written by an earlier version
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    assert shards.ensure(config).selections == {}


def test_duplicates_are_kept_where_that_is_asked_for(folder, capsys):
    shards.ensure(config_for(folder, duplicates="keep"))
    assert "5 files of 2.5 KB, 5 documents" in capsys.readouterr().err


def test_a_run_that_took_copies_goes_on_with_them(folder, tmp_path):
    copies = config_for(folder, duplicates="keep").data
    old = sources.open_source(copies, digest_of_old(copies))  # earlier versions took copies
    assert len([*old.documents("train"), *old.documents("eval")]) == 5
    resumed = sources.open_source(config_for(folder).data, old.fingerprint)
    assert list(resumed.documents("train")) == list(old.documents("train"))
    assert resumed.fingerprint == old.fingerprint
    new = sources.open_source(config_for(folder).data, "of another run")
    assert new.selections["data"].documents == 4


def digest_of_old(config):
    """The fingerprint that earlier versions gave: of the files and the rule of every n-th."""
    checksums = [
        files.sha256(p) for p in sorted(Path(config.path).glob("*.txt")) if p.stat().st_size
    ]
    return files.digest(files.digest(*checksums), f"text {config.eval_fraction}")


def test_rows_of_copies_go_on_too(tmp_path):
    rows = "".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(rows)
    data = dict(source="jsonl", path=str(tmp_path), eval_fraction=0.25)
    settings = dict(task=dict(name="classification"))
    old = splits.read_splits(make_config(data=dict(**data, duplicates="keep"), **settings))
    resumed = splits.read_splits(make_config(data=data, **settings), old.fingerprint)
    assert resumed.train == old.train and len(old.train) > 6
    assert len(splits.read_splits(make_config(data=data, **settings)).train) == 6


def test_empty_documents_are_counted(tmp_path):
    rows = [{"text": ""}, {"text": "a b"}, {"text": ""}, {"text": "d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(
        data=dict(source="jsonl", path=str(tmp_path), eval_fraction=0.25, tokenizer="bytes"),
        model=dict(context=4),
    )
    assert shards.ensure(config).summary() == (
        "training 6 tokens (3 documents, 2 of them empty); held out 2 tokens (1 document)"
    )


def test_examples_say_what_they_were_made_of(tmp_path, capsys):
    for name in ("train", "test", "more"):
        rows = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(
        data=dict(
            source="jsonl",
            path=f"{tmp_path}/train.jsonl",
            eval_path=f"{tmp_path}/test.jsonl",
            mixture=[f"{tmp_path}/more.jsonl=2"],
        ),
        task=dict(name="classification"),
    )
    data = loading.load_examples(config, ByteTokenizer())
    said = capsys.readouterr().err
    for name, path in (
        ("data", "train"),
        ("held-out data", "test"),
        (f"mixture {tmp_path}/more.jsonl=2", "more"),
    ):
        assert f"{name}: {tmp_path}/{path}.jsonl: 1 file of " in said
    assert data.summary() == "training 76 tokens (12 examples); held out 24 tokens (4 examples)"


def write_config(tmp_path, data):
    (tmp_path / "config.py").write_text(
        "from configs import debug\n\ndef get_config():\n    c = debug.get_config()\n"
        + "".join(f"    c.data.{name} = {value!r}\n" for name, value in data.items())
        + "    return c\n"
    )
    return str(tmp_path / "config.py")


def test_the_preview_shows_documents_of_a_config_without_a_task(folder, tmp_path, capsys):
    config = write_config(tmp_path, dict(source="text", path=str(folder), eval_fraction=0.25))
    preview.main([f"--config={config}", "--count=2"])
    shown = capsys.readouterr()
    assert all(line in shown.err for line in lines(folder))
    assert shown.out.startswith("document 1: 500 characters\ndocument 0 of the corpus\n")
    assert "document 2: 500 characters\ndocument 1 of the corpus\n" in shown.out
    assert "document 3" not in shown.out and " ...\n" in shown.out
    preview.main([f"--config={config}", "--split=eval"])
    assert capsys.readouterr().out.startswith("document 1: 500 characters\ndocument 3 of the")
    shards.prepare(config_for(folder), tmp_path / "out")
    config = write_config(tmp_path, dict(source="shards", path=str(tmp_path / "out")))
    preview.main([f"--config={config}", "--count=1"])
    shown = capsys.readouterr()
    assert lines(folder)[1] in shown.err and "\ndocument 0 of the corpus\n" in shown.out


def test_the_report_says_what_was_taken(folder, tmp_path):
    config = config_for(folder)
    data = setup.load_data(config, None)
    report.mark(tmp_path, selection=[*lines(folder), data.summary()])
    (tmp_path / "config.json").write_text(schema.to_json(config))
    report.write(tmp_path, None)
    page = (tmp_path / "report.html").read_text()
    assert all(f"<p>{line}</p>" in page for line in [*lines(folder), data.summary()])
