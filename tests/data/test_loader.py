"""Batches of windows: random access, epochs, isolation of documents by construction."""

import jax
import numpy as np
import pytest
from conftest import make_config

from gptjax.config.errors import UserError
from gptjax.data import loader, shards
from gptjax.data.sources import EVAL, TRAIN


def config_for(path, **data):
    return make_config(data=dict(source="text", path=str(path), **data), model=dict(context=32))


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
    steps = [next(batches) for _ in range(n)]
    batches.close()
    return steps


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
    all_rows = take(w, 3)
    halves = [take(w, 3, rows=rows) for rows in (range(4), range(4, 8))]
    for step in range(3):
        np.testing.assert_array_equal(
            all_rows[step].tokens, np.concatenate([half[step].tokens for half in halves])
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
