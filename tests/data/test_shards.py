"""Token shards: every document, resumption, damage, folders in use."""

import itertools
import multiprocessing
import shutil

import numpy as np
import pytest
from conftest import make_config

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.data import shards
from gptjax.data.sources import TRAIN
from gptjax.tokenizer.trained import ByteTokenizer


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
    uncut = shards.prepare(config, tmp_path / "uncut", shard_tokens=100)
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
    assert not set(encoded) & set(written)  # finished shards are not written again
    assert again.fingerprint == uncut.fingerprint
    for name in [p.name for p in (tmp_path / "uncut").iterdir() if p.suffix == ".npy"]:
        assert (tmp_path / "uncut" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


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


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "meta is empty": lambda folder: (folder / "meta.json").write_text(""),
    "meta is something else": lambda folder: (folder / "meta.json").write_text("{}"),
    "meta is a list": lambda folder: (folder / "meta.json").write_text("[]"),
    "meta is no UTF-8": lambda folder: (folder / "meta.json").write_bytes(b"{\xff}"),
    "a shard is cut": lambda folder: _cut(folder / "train-00000.tokens.npy"),
    "a shard is gone": lambda folder: (folder / "train-00000.offsets.npy").unlink(),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "a file for a folder": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}
HALF_MADE = {
    "its shard is gone": lambda folder: (folder / "train-00000.tokens.npy").unlink(),
    "its record is cut": lambda folder: _cut(folder / "train-00000.json"),
    "its record is no object": lambda folder: (folder / "train-00000.json").write_text("7"),
    "its key is no UTF-8": lambda folder: (folder / "key").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, *HALF_MADE])
def test_damaged_data_of_the_cache_is_set_aside_and_prepared_anew(
    damage, tmp_path, corpus, monkeypatch, capsys
):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    config = config_for(corpus, eval_fraction=0.1)
    prepared = shards.ensure(config)
    before = next(prepared.arrays(TRAIN))[0].tolist()
    if damage in HALF_MADE:
        (prepared.folder / "meta.json").unlink()
    (DAMAGES | HALF_MADE)[damage](prepared.folder)
    capsys.readouterr()
    again = shards.ensure(config)
    assert next(again.arrays(TRAIN))[0].tolist() == before
    assert capsys.readouterr().err.count("it is prepared anew; set aside as") == 1
    assert shards.ensure(config).folder == prepared.folder
    assert "anew" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", [*DAMAGES, *HALF_MADE])
def test_damaged_data_of_the_user_is_refused(damage, tmp_path, corpus):
    config = config_for(corpus, eval_fraction=0.1)
    folder = tmp_path / "own"
    shards.prepare(config, folder)
    if damage in HALF_MADE:
        (folder / "meta.json").unlink()
    (DAMAGES | HALF_MADE)[damage](folder)
    with pytest.raises(UserError, match=str(folder)):
        shards.prepare(config, folder)
    assert not (tmp_path / "damaged").exists()


def test_damage_is_found_before_the_rest_is_prepared(tmp_path, corpus, monkeypatch):
    config = config_for(corpus, eval_fraction=0.1)
    folder = tmp_path / "own"
    shards.prepare(config, folder)
    for path in folder.glob("eval-*"):
        path.unlink()
    (folder / "meta.json").unlink()
    (folder / "train-00000.tokens.npy").unlink()
    monkeypatch.setattr(shards, "_write_shard", None)  # calling it would raise
    with pytest.raises(UserError, match="unfinished preparation is damaged"):
        shards.prepare(config, folder)


def test_a_cache_that_cannot_be_written_is_named_with_a_way_out(tmp_path, corpus, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError) as raised:
        shards.ensure(config_for(corpus, eval_fraction=0.1))
    assert "export GPTJAX_CACHE=FOLDER" in files.explain(raised.value)
