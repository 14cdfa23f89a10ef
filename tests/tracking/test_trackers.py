"""Where metrics go: what a tracker keeps, what a resumed run continues, what never stops a run."""

import errno
import importlib
import importlib.util
import json
import math
import os
import resource
import sqlite3
import threading
import time
from unittest.mock import Mock

import pytest
from conftest import TINY, command, make_config

from gptjax.config import schema
from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.tracking import background, base, jsonl, trackers
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
        ("log", ["start", "log", "close"]),
        ("close", ["start", "log", "log", "close", "close"]),
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
    lost = {"start": "it has no records", "log": "records of step 1 on are lost"}
    lost["close"] = "records of step 2 on are lost"
    lines = capsys.readouterr().err.splitlines()
    message = "tracker broken: ConnectionError: the server is away; the run goes on without it"
    assert lines == ([] if where == "never" else [f"{message} ({lost[where]})"])
    assert [r["step"] for r in jsonl.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "tb").iterdir())


class Hanging(Broken):
    """A tracker that waits for ever where it is told to, until `released`."""

    def __init__(self, where):
        super().__init__(where)
        self.released = threading.Event()

    def _maybe(self, where):
        self.calls.append(where)
        if where == self.where:
            self.released.wait(20)


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_a_tracker_that_hangs_holds_nothing_up(where, tmp_path, monkeypatch, capsys):
    hanging, module = Hanging(where), trackers._module
    monkeypatch.setattr(trackers, "_module", lambda n: hanging if n == "hanging" else module(n))
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(background, "MOST_WAITING", 50)
    began = time.monotonic()
    opened = trackers.Trackers(["hanging"], run_of(tmp_path))
    for step in range(1, 101):
        opened.log(step, {"train/loss": 1.0})
        # those that keep up are not behind: metrics.jsonl, and one that hangs at its close alone
        keeping_up = opened._trackers[: 2 if where == "close" else 1]
        while any(tracker._queue.qsize() > 25 for tracker in keeping_up):
            time.sleep(0.001)
        while where != "start" and not opened._trackers[1]._step:  # its thread has not begun
            time.sleep(0.001)
    opened.close()
    assert time.monotonic() - began < 15  # it hangs for 20
    message = capsys.readouterr().err
    assert message.count("tracker hanging: ") == message.count("\n") == 1
    assert ("50 records wait" in message) == (where != "close")
    assert "records of step" in message or where == "start"
    assert [r["step"] for r in jsonl.read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 101))
    left = [t for t in threading.enumerate() if t.name.startswith(cli.GIVEN_UP)]
    assert len(left) == 1  # by which the process's end knows
    hanging.released.set()
    left[0].join(5)
    assert not left[0].is_alive()


def test_a_run_that_is_stopped_waits_less(tmp_path, monkeypatch, capsys):
    hanging = Hanging("log")
    monkeypatch.setattr(trackers, "_module", lambda n: hanging)
    monkeypatch.setattr(background, "STOPPED_SECONDS", 0.5)
    monkeypatch.setattr(background, "_SILENT_SECONDS", 0.1)
    opened = trackers.Trackers(["hanging"], run_of(tmp_path))
    opened.log(1, {"train/loss": 1.0})
    began = time.monotonic()
    opened.close(lambda: time.monotonic() - began > 0.4)  # the signal comes during the wait
    assert time.monotonic() - began < 10
    message = capsys.readouterr().err
    assert "tracker hanging: waiting for it, 1" in message  # 120 or 119 s at most
    assert "(records of step 1 on are lost)" in message
    hanging.released.set()


def test_a_full_disk_never_stops_tensorboard_for_ever(tmp_path, monkeypatch, capsys):
    module = importlib.import_module("gptjax.tracking.tensorboard")
    monkeypatch.setattr(module, "_FLUSH_SECONDS", -1)
    opened = trackers.Trackers(["tensorboard"], run_of(tmp_path))
    opened.log(1, {"train/loss": 1.0})
    for _ in range(3000):
        if list(tmp_path.glob("tb/*")):
            break
        time.sleep(0.01)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
        for step in range(2, 202):
            opened.log(step, {"train/loss": 1.0, "train/lr": 1.0})
        opened.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    message = capsys.readouterr().err
    assert message.count("tracker tensorboard: OSError: File too large") == 1
    assert opened.latest[-1] == {"step": 201, "train/loss": 1.0, "train/lr": 1.0}
    assert "the records of steps" in message  # of metrics.jsonl, at the end


def test_records_wait_in_memory_while_a_disk_is_full(tmp_path, monkeypatch, capsys):
    path, append = tmp_path / "metrics.jsonl", jsonl._append
    tracker = jsonl.start(run_of(tmp_path))
    tracker.log(1, {"train/loss": 1.0})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(jsonl, "_append", Mock(side_effect=full))
    tracker.log(2, {"train/loss": 2.0})
    tracker.log(3, {"train/loss": 3.0})
    message = capsys.readouterr().err
    assert message.count("No space left on device") == 1 and "step 2 on wait in memory" in message
    monkeypatch.setattr(jsonl, "_append", append)
    tracker.log(4, {"train/loss": 4.0})
    tracker.close()
    assert [r["step"] for r in jsonl.read_jsonl(path)] == [1, 2, 3, 4]
    assert "all records are written after all" in capsys.readouterr().err


def test_half_a_record_is_taken_back_and_what_is_lost_is_named(tmp_path, capsys):
    tracker = jsonl.start(run_of(tmp_path))
    tracker.log(1, {"train/loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limit[1]))
        tracker.log(2, {"train/loss": 2.0})
        tracker.log(3, {"train/loss": 3.0})
        tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert "the records of steps 2 to 3 are lost" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe", "bytes", "torn", "middle"])
def test_a_damaged_metrics_file_is_set_aside_and_begun_anew(kind, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    first = b'{"step": 1, "time": 1, "train/loss": 2.5}\n'
    content = {
        "bytes": b"\xff\xfe\x00\n",
        "torn": first + b'{"step": 2, "ti',
        "middle": b'\xff\n{"step": "1"}\n' + first,
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)  # reading it would never end
    else:
        path.write_bytes(content[kind])
    opened = trackers.Trackers([], run_of(tmp_path, start=1))
    opened.log(2, {"train/loss": 2.25})
    opened.close()
    kept = [1, 2] if kind in ("torn", "middle") else [2]
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == kept
    (aside,) = (tmp_path / "damaged").iterdir()
    assert str(aside) in capsys.readouterr().err
    assert kind not in content or aside.read_bytes() == content[kind]


def test_records_past_the_start_go_without_any_space(tmp_path, monkeypatch):
    log_all(jsonl.start(run_of(tmp_path)))
    monkeypatch.setattr(files, "write_bytes", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    jsonl.start(run_of(tmp_path, start=1)).close()
    assert [r["step"] for r in jsonl.read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_a_run_id_that_is_none_is_made_anew(tmp_path):
    (tmp_path / "run_id").write_bytes(b"\xff\xfe\n")
    assert base.stored_run_id(tmp_path, lambda: "new") == "new"
    assert base.stored_run_id(tmp_path, lambda: "newer") == "new"


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
