"""Where metrics go: what a tracker keeps, what a resumed run continues, what never stops a run."""

import errno
import importlib
import importlib.util
import json
import math
import os
import sqlite3
from unittest.mock import Mock

import pytest
from conftest import TINY, command, make_config

from gptjax.config import schema
from gptjax.config.errors import UserError
from gptjax.tracking import jsonl, trackers
from gptjax.tracking.base import TrackedRun

RECORDS = {1: {"train/loss": 2.5, "train/lr": 1e-3}, 2: {"train/loss": 2.25}}


def run_of(workdir, start=0):
    return TrackedRun(workdir, start, schema.to_dict(make_config()))


def log_all(tracker, records=RECORDS):
    for step, values in records.items():
        tracker.log(step, values)
    tracker.close()


@pytest.mark.parametrize("name", schema.TRACKERS)
def test_each_name_has_a_file_that_says_how_to_install_it(name):
    module = importlib.import_module(f"gptjax.tracking.{name}")
    assert module.PACKAGE in module.INSTALL or f"gptjax[{name}]" in module.INSTALL
    assert callable(module.start)


def test_metrics_jsonl_holds_json_and_a_resumed_run_drops_what_comes_after_its_start(tmp_path):
    log_all(jsonl.start(run_of(tmp_path)), {**RECORDS, 3: {"train/loss": math.nan}})
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'7\n{"time": 1}\n\xff\n{"step": 4, "ti')  # damage; a kill in mid-line
    assert [r["step"] for r in jsonl.read_jsonl(path)] == [1, 2, 3]
    assert jsonl.read_jsonl(path)[2]["train/loss"] == "nan"
    log_all(jsonl.start(run_of(tmp_path, start=1)), {2: {"train/loss": 2.25}})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["train/loss"]) for r in records] == [(1, 2.5), (2, 2.25)]
    assert all("time" in r for r in records)


class Broken:
    """A tracker that fails where it is told to."""

    PACKAGE, INSTALL = "json", "nothing to install"

    def __init__(self, where):
        self.where, self.calls = where, []

    def start(self, run):
        self._maybe("start")
        return self

    def log(self, step, values):
        self._maybe("log")

    def close(self):
        self._maybe("close")

    def _maybe(self, where):
        self.calls.append(where)
        if where == self.where:
            raise ConnectionError("the server is away\nand more")


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("start", ["start"]),
        ("log", ["start", "log"]),
        ("close", ["start", "log", "log", "close"]),
        ("never", ["start", "log", "log", "close"]),
    ],
)
def test_a_tracker_that_fails_is_named_once_and_dropped(
    where, calls, tmp_path, monkeypatch, capsys
):
    broken, module = Broken(where), trackers._module
    monkeypatch.setattr(trackers, "_module", lambda n: broken if n == "broken" else module(n))
    log_all(trackers.Trackers(["broken", "tensorboard"], run_of(tmp_path)))
    assert broken.calls == calls
    lines = capsys.readouterr().err.splitlines()
    assert lines == (
        []
        if where == "never"
        else ["tracker broken: ConnectionError: the server is away; the run goes on without it"]
    )
    assert [r["step"] for r in jsonl.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "tb").iterdir())


def test_a_metrics_file_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "start" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(OSError):
        trackers.Trackers([], run_of(tmp_path / "start"))
    opened = trackers.Trackers([], run_of(tmp_path))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(jsonl.JsonlTracker, "log", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        opened.log(1, {})
    opened.close()


def test_a_missing_package_is_one_message_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb.*pip install 'gptjax\[wandb\]'"):
        trackers.check_installed(["wandb"])
    trackers.check_installed([])


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    broken = Broken("never")
    broken.PACKAGE = "some_tracker"
    monkeypatch.setattr(trackers, "_module", lambda name: broken)
    with pytest.raises(UserError, match="nothing to install"):
        trackers.check_installed(["any"])


def test_an_unknown_tracker_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"train.trackers: no choice 'wandbb'.*'wandb'"):
        make_config(train=dict(trackers=("wandbb",)))


def test_trackers_may_change_when_a_run_is_resumed():
    fields = {path: field for path, _, field in schema.all_settings()}
    assert not fields["train.trackers"].metadata["shapes"]
    assert fields["train.trackers"].metadata["choices"] == schema.TRACKERS


@pytest.mark.slow
def test_mlflow_keeps_every_value_in_one_run_that_a_resumed_run_continues(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra gptjax[mlflow] is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metrics = train_twice(tmp_path, "mlflow")
    with sqlite3.connect(tmp_path / "run" / "mlflow" / "mlflow.db") as base:
        rows = base.execute("select step, value, run_uuid from metrics where key = 'train/loss'")
        steps = {step: (value, run_id) for step, value, run_id in rows}
        params = dict(base.execute("select key, value from params"))
        (status,) = base.execute("select status from runs").fetchone()
    assert {step: value for step, (value, _) in steps.items()} == metrics
    run_id = (tmp_path / "run" / "mlflow" / "run_id").read_text().strip()
    assert {run_id} == {run_id for _, run_id in steps.values()}
    assert params["model.layers"] == "1"
    assert status == "FINISHED"


@pytest.mark.slow
def test_wandb_works_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra gptjax[wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = train_twice(tmp_path, "wandb")
    folder = tmp_path / "run" / "wandb"
    run_id = (folder / "run_id").read_text().strip()
    stored = sorted(folder.glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(stored) == len(list(folder.glob("offline-run-*"))) == 2
    history = {}
    for path in stored:
        history |= wandb_history(path)
    assert history == metrics


def train_twice(tmp_path, name):
    """A run to step 2, then on to step 4. Returns {step: train/loss} of metrics.jsonl."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    flags = [
        *TINY,
        f"--config.data.path={corpus}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.train.trackers={name}",
        "--config.train.steps=4",
        "--config.optim.warmup_steps=1",
        "--config.train.log_every=1",
        "--config.train.sample_tokens=0",
    ]
    for stop in (2, 0):
        done = command("gptjax.train", *flags, f"--config.train.stop_at={stop}")
        assert "goes on without it" not in done.stderr
    records = jsonl.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def wandb_history(path):
    """{step: train/loss} of an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    history = {}
    for data in leveldb_records(path.read_bytes()):
        record = Record.FromString(data)
        values = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if "train/loss" in values:
            history[record.history.step.num] = values["train/loss"]
    return history


def leveldb_records(data):
    """The records of a log of LevelDB: blocks of 32 KiB of fragments with a header of 7 bytes."""
    at, record, block = 7, b"", 32768  # W&B's own header comes first
    while at < len(data):
        if block - at % block < 7:  # too short for a header: filled up
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # complete, or the last fragment
            yield record
            record = b""
