"""Documents, shards and batches: splits, resumption, random access, isolation by construction."""

import gzip
import itertools
import json
import multiprocessing
import sys

import jax
import numpy as np
import pytest
from conftest import SHARED, make_config

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.data import loader, shards, sources
from gptjax.data.sources import EVAL, TRAIN
from gptjax.tokenizer.trained import ByteTokenizer


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


def config_for(path, **data):
    return make_config(data=dict(source="text", path=str(path), **data), model=dict(context=32))


def test_shards_hold_every_document_after_eot(tmp_path, corpus):
    for i in range(9):
        (tmp_path / f"doc{i}.txt").write_text("x" * i + f"document {i}")
    prepared = shards.prepare(
        config_for(tmp_path / "doc*.txt", eval_fraction=0.0), tmp_path / "out", shard_tokens=40
    )
    assert len(prepared.splits[TRAIN]) > 2
    texts = []
    for tokens, offsets in prepared.arrays(TRAIN):
        assert tokens.dtype == np.uint16
        for a, b in itertools.pairwise(offsets):
            assert tokens[a] == prepared.tokenizer.eot
            texts.append(prepared.tokenizer.decode(tokens[a + 1 : b].tolist()))
    assert texts == ["x" * i + f"document {i}" for i in range(9)]


def test_interrupted_preparation_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * (1 + i % 5))
    config = config_for(tmp_path / "*.txt", eval_fraction=0.1)
    whole = shards.prepare(config, tmp_path / "whole", shard_tokens=100)
    written, original = [], shards._write_shard

    def dying(*args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(args[-1])
        return original(*args)

    monkeypatch.setattr(shards, "_write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(config, tmp_path / "cut", shard_tokens=100)
    with pytest.raises(UserError, match="no prepared data"):
        shards.open_prepared(tmp_path / "cut")
    encoded = []
    monkeypatch.setattr(
        shards, "_write_shard", lambda *args: encoded.append(args[-1]) or original(*args)
    )
    again = shards.prepare(config, tmp_path / "cut", shard_tokens=100)
    assert not set(encoded) & set(written)  # finished shards are kept
    assert again.fingerprint == whole.fingerprint
    for name in [p.name for p in (tmp_path / "whole").iterdir() if p.suffix == ".npy"]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_shards_in_the_cache_keep_no_chat_template(corpus):
    config = make_config(data=dict(source="text", path=str(corpus), tokenizer="bytes"))
    tuned = ByteTokenizer()
    tuned.chat_template = "of another checkpoint"
    assert shards.ensure(config, tuned).tokenizer is tuned
    assert not shards.ensure(config).tokenizer.chat_template


def test_a_shard_rewritten_with_as_many_tokens_is_refused(tmp_path, corpus):
    prepared = shards.prepare(config_for(corpus), tmp_path / "out")
    shard = tmp_path / "out" / f"{prepared.splits[TRAIN][0]['name']}.tokens.npy"
    tokens = np.load(shard)
    tokens[5] += 1
    np.save(shard, tokens)
    with pytest.raises(UserError, match="was changed"):
        shards.open_prepared(tmp_path / "out")


def test_damaged_shards_and_foreign_folders_are_refused(tmp_path, corpus):
    config = config_for(corpus)
    prepared = shards.prepare(config, tmp_path / "out")
    with pytest.raises(UserError, match="other data"):
        shards.prepare(config_for(corpus, eval_fraction=0.3), tmp_path / "out")
    shard = tmp_path / "out" / f"{prepared.splits[TRAIN][0]['name']}.tokens.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        shards.open_prepared(tmp_path / "out")


@pytest.fixture
def windows(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"<{i}>" * (3 + 5 * (i % 4)))
    prepared = shards.prepare(
        config_for(tmp_path / "*.txt", eval_fraction=0.25), tmp_path / "out", shard_tokens=90
    )
    return loader.Windows.of(prepared, TRAIN, 32, mask_documents=True), prepared


def take(windows, n, *, start=0, rows=range(8), seed=3):
    batches = loader.train_batches(windows, seed=seed, batch_size=8, rows=rows, start=start)
    found = [next(batches) for _ in range(n)]
    batches.close()
    return found


def test_batches_are_a_function_of_seed_and_step(windows):
    w, _ = windows
    all_steps = take(w, 6)
    for a, b in zip(all_steps[4:], take(w, 2, start=4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert any(
        (a.tokens != b.tokens).any() for a, b in zip(all_steps, take(w, 6, seed=4), strict=True)
    )


def test_processes_together_read_what_one_reads(windows):
    w, _ = windows
    whole = take(w, 3)
    halves = [take(w, 3, rows=rows) for rows in (range(4), range(4, 8))]
    for step in range(3):
        np.testing.assert_array_equal(
            whole[step].tokens, np.concatenate([half[step].tokens for half in halves])
        )


def test_windows_follow_the_stream_and_documents_become_segments(windows):
    w, prepared = windows
    stream = np.concatenate([tokens for tokens, _ in prepared.arrays(TRAIN)]).astype(np.int32)
    np.testing.assert_array_equal(w.read(0, w.total), stream)
    eot = prepared.tokenizer.eot
    for start in range(0, w.total - 33, 7):
        x = w.window(start)
        np.testing.assert_array_equal(x.tokens, stream[start : start + 32])
        np.testing.assert_array_equal(x.targets, stream[start + 1 : start + 33])
        new = x.tokens == eot
        np.testing.assert_array_equal(x.segment_ids, 1 + np.cumsum(new))
        for i in range(32):
            expected = 0 if i == 0 or new[i] else x.positions[i - 1] + 1
            assert x.positions[i] == expected


def test_evaluation_sees_every_token_once(windows):
    _, prepared = windows
    w = loader.Windows.of(prepared, EVAL, 32, mask_documents=True)
    batches = list(loader.eval_batches(w, batch_size=8, rows=range(8)))
    seen = np.concatenate([b.targets[b.loss_weights > 0] for b in batches])
    np.testing.assert_array_equal(seen, w.read(1, w.total))
    assert {b.tokens.shape for b in batches} == {(8, 32)}


def test_an_epoch_covers_the_text(windows):
    w, _ = windows
    count = (w.total - 1) // 32
    starts = set()
    for batch in take(w, 40):
        starts.update(
            int(np.flatnonzero((w.read(0, w.total)[:-32, None] == row[0]).any(1))[0])
            for row in batch.tokens
        )
    order = loader._Steps(w, 3, 8, range(8))._order
    assert sorted(order[i] for i in range(count)) == list(range(count))
    assert len(starts) > 5


def test_context_longer_than_the_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    prepared = shards.prepare(config_for(tmp_path / "a.txt", eval_fraction=0.0), tmp_path / "out")
    with pytest.raises(UserError, match="needs 33"):
        loader.train_batches(
            loader.Windows.of(prepared, TRAIN, 32, mask_documents=True),
            seed=0,
            batch_size=2,
            rows=range(2),
            start=0,
        )


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
    """A copy of the sample whose dataset_info names the format that tfds reads without TensorFlow (see its NOTE)."""
    import shutil

    shutil.copytree(SHARED / "tfds_c4_minimal" / "c4", tmp_path / "c4")
    info = tmp_path / "c4" / "en" / "3.1.0" / "dataset_info.json"
    data = json.loads(info.read_text())
    info.chmod(0o644)
    info.write_text(json.dumps({**data, "fileFormat": "array_record", "name": "c4"}))
    return tmp_path


def test_tfds_made_here(tmp_path):
    """A data set built and read by tfds without TensorFlow, so that users test the path without our sample."""
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


def _hold_lock(folder, ready, release):
    from gptjax.core import files

    with files.lock(folder):
        ready.set()
        release.wait(30)


def test_a_folder_in_use_is_refused_by_name(tmp_path):
    from gptjax.core import files

    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold_lock, args=(tmp_path, ready, release))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"pid.*{other.pid}"), files.lock(tmp_path):
        pytest.fail("two holders")
    release.set()
    other.join()
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").exists()
