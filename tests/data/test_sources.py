"""Sources: documents and their splits, and what it takes to add a source."""

import dataclasses
import gzip
import json
import sys

import pytest
from conftest import SHARED

from gptjax.config.build import build_config
from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.data import sources
from gptjax.data.readers import files, finding, opening
from gptjax.data.records import Record
from gptjax.data.sources import EVAL, TRAIN


def both(config):
    source = sources.open_source(config)
    return list(source.documents(TRAIN)), list(source.documents(EVAL))


def test_the_embedded_corpus_holds_whole_messages_out():
    train, held_out = both(DataConfig(eval_fraction=0.05))
    assert len(train) + len(held_out) == 249
    assert len(held_out) == 12
    assert not set(train) & set(held_out)
    assert train[0].startswith("Fellow-Citizens of the Senate and House")


def test_one_file_holds_its_end_out(corpus):
    train, held_out = both(DataConfig(source="text", path=str(corpus), eval_fraction=0.1))
    assert train[0] + held_out[0] == corpus.read_text()
    assert len(held_out[0]) == pytest.approx(0.1 * len(corpus.read_text()), abs=1)


def test_folders_globs_and_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(4):
        (tmp_path / "sub" / f"{i}.txt").write_text(f"text {i}")
    folder = both(DataConfig(source="text", path=str(tmp_path), eval_fraction=0.25))
    assert folder == (["text 0", "text 1", "text 2"], ["text 3"])
    assert (
        both(DataConfig(source="text", path=str(tmp_path / "sub" / "*.txt"), eval_fraction=0.25))
        == folder
    )
    rows = [{"body": f"row {i}", "id": i} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows[:2]) + "\n\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(r) for r in rows[2:]))
    assert both(
        DataConfig(source="jsonl", path=str(tmp_path), field="body", eval_fraction=0.5)
    ) == (["row 0", "row 2"], ["row 1", "row 3"])


def test_fingerprint_follows_content_and_split(corpus):
    of = lambda **changes: (
        sources.open_source(DataConfig(source="text", path=str(corpus), **changes)).fingerprint
    )
    before = of()
    assert of() == before
    assert of(eval_fraction=0.2) != before
    corpus.write_text(corpus.read_text().replace("Line 7:", "Line 8:", 1))
    assert of() != before


def read_pipes(config, path, split):
    """A reader as a user would add it: fields with | between them, named by data.columns."""
    found = finding.find_files(path, (".pipe",))

    def read():
        for p in found.paths:
            for number, line in opening.read_lines(p):
                values = line.decode().rstrip("\n").split("|")
                yield Record(f"{p}:{number}", dict(zip(config.columns, values, strict=True)))

    return files.records_of_files(found, read)


def test_a_row_in_the_table_is_a_new_source(tmp_path, monkeypatch):
    (tmp_path / "a.pipe").write_text("one|x\ntwo|y\n")
    settings = {"data": {"source": "pipes", "columns": ["text", "label"], "eval_fraction": 0.5}}
    with pytest.raises(UserError, match=r"data.source = .pipes.: must be one of sotu, text, jsonl"):
        build_config(settings)
    monkeypatch.setitem(sources.SOURCES, "pipes", sources.SourceKind(read_pipes))
    with pytest.raises(UserError, match=r"data.path is empty and data.source = 'pipes'"):
        build_config(settings)
    settings["data"]["path"] = str(tmp_path)
    settings["task"] = {"name": "classification"}  # tasks take its records, as of any other
    assert both(build_config(settings).data) == (["one"], ["two"])


def test_a_task_needs_records():
    settings = {"task": {"name": "text"}, "data": {"source": "text", "path": "x"}}
    with pytest.raises(UserError, match="has none: one of sotu, jsonl, csv, lines, squad"):
        build_config(settings)


@pytest.mark.skipif(
    not (SHARED / "tfds_c4_minimal").is_dir(), reason="the developers' sample of C4 is not here"
)
def test_c4_through_tfds_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    folder = c4(tmp_path)
    train, held_out = both(DataConfig(source="tfds", path=str(folder), name="c4/en:3.1.0"))
    assert (len(train), len(held_out)) == (1000, 200)
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="fields"):
        both(DataConfig(source="tfds", path=str(folder), name="c4/en:3.1.0", field="txt"))


def c4(tmp_path):
    """A copy of the sample, in the format that tfds reads without TensorFlow."""
    import shutil

    shutil.copytree(SHARED / "tfds_c4_minimal" / "c4", tmp_path / "c4")
    info = tmp_path / "c4" / "en" / "3.1.0" / "dataset_info.json"
    data = json.loads(info.read_text())
    info.chmod(0o644)
    info.write_text(json.dumps({**data, "fileFormat": "array_record", "name": "c4"}))
    return tmp_path


def test_tfds_made_here(tmp_path):
    """A data set built and read by tfds without TensorFlow, for machines without our sample."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(20)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"text": f"example {i}"}

    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    train, held_out = both(
        DataConfig(source="tfds", path=str(tmp_path), name="tiny:1.0.0", eval_fraction=0.1)
    )
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted(train + held_out) == sorted(f"example {i}" for i in range(20))
    for setting in ("train_split", "eval_split"):
        with pytest.raises(UserError, match=r"tiny:1.0.0 has no split 'trian': it has train"):
            both(
                DataConfig(
                    source="tfds", path=str(tmp_path), name="tiny:1.0.0", **{setting: "trian"}
                )
            )


def test_documents_that_are_fewer_than_counted_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.pipe").write_text("one\ntwo\n")
    config = DataConfig(source="pipes", path=str(tmp_path), columns=("text",))

    def read_fewer(config, path, split):
        records = read_pipes(config, path, split)
        return dataclasses.replace(records, count=records.count + 1)

    monkeypatch.setitem(sources.SOURCES, "pipes", sources.SourceKind(read_fewer))
    with pytest.raises(UserError, match=r"has 3 documents, and 2 were read: was it changed"):
        both(config)
