"""What is due after a step is done, or owed: stopped and killed in evaluations, by any signal."""

import contextlib
import os
import signal

import pytest
from conftest import TINY

from gptjax.core import cli, files
from gptjax.runtime.compile_cache import Compiles
from gptjax.runtime.interrupt import SIGNALS, Interrupted, Stop
from gptjax.tracking.jsonl import read_jsonl
from gptjax.training import loop
from gptjax.training.batches import SplitBatches
from gptjax.training.setup import setup

SETTINGS = {
    "steps": 6,
    "eval_every": 3,
    "sample_every": 3,
    "log_every": 3,
    "keep_best": True,
    "batch_size": 8,  # a row a device
    "grad_accum_steps": 1,
}
TEXT = "".join(f"Line {i}: the quick fox jumps over {i % 7} dogs.\n" for i in range(60))


@pytest.fixture(autouse=True)
def handlers():
    """No signal is ignored, as it would be under nohup; afterwards all are as before."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Killed(Exception):  # noqa: N818
    """Ends a run like SIGKILL would: nothing after it is done."""


def run(corpus, workdir, **settings):
    """One start of the command. Returns its summary."""
    flags = [f"--config.train.{name}={value}" for name, value in (SETTINGS | settings).items()]
    argv = [*TINY, f"--config.data.path={corpus}", *flags]
    args = cli.parse(argv, "", {}, required=("config",))
    return loop.train(setup(args.config, workdir, args.overrides, Stop(), Compiles()))


def scores(workdir):
    """{step: its held-out loss}."""
    records = read_jsonl(workdir / "metrics.jsonl")
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def samples(workdir):
    return {path.stem: path.read_text() for path in (workdir / "samples").glob("*.txt")}


def bests(workdir):
    return sorted(path.name for path in (workdir / "best").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The workdir of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "corpus.txt").write_text(TEXT)
    summary = run(folder / "corpus.txt", folder / "run")
    assert summary["status"] == "finished"
    assert sorted(scores(folder / "run")) == [3, 6]
    return folder / "run"


@pytest.fixture
def corpus(expected):
    return expected.parent / "corpus.txt"


def fail_at(monkeypatch, name, call, action):
    """The `call`-th call of loop.<name> does `action` first."""
    original, calls = getattr(loop, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, name, wrapped)


def kill():
    raise Killed


@pytest.mark.parametrize(
    ("name", "call", "save_every"),
    [
        ("held_out_scores", 1, 3),
        ("held_out_scores", 2, 3),
        ("held_out_scores", 2, 0),
        ("sample_text", 1, 3),
    ],
)
def test_killed_in_an_evaluation(monkeypatch, corpus, tmp_path, expected, name, call, save_every):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        fail_at(patch, name, call, kill)
        run(corpus, workdir, save_every=save_every)
    summary = run(corpus, workdir, save_every=save_every)
    assert summary["status"] == "finished"
    assert scores(workdir) == scores(expected)
    assert samples(workdir) == samples(expected)
    assert bests(workdir) == bests(expected)
    assert summary["eval/loss"] == scores(expected)[6]


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGTERM, "held_out_scores"),
        (signal.SIGHUP, "held_out_scores"),
        (signal.SIGINT, "sample_text"),
    ],
)
def test_a_signal_in_an_evaluation_saves_at_once(
    monkeypatch, corpus, tmp_path, expected, name, number
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at(patch, name, 1, lambda: os.kill(os.getpid(), number))
        summary = run(corpus, workdir)
    assert (summary["status"], summary["step"]) == ("interrupted", 3)
    assert (workdir / "checkpoints" / "3").is_dir()
    assert scores(workdir) == ({} if name == "held_out_scores" else {3: scores(expected)[3]})
    run(corpus, workdir)
    assert scores(workdir) == scores(expected)
    assert samples(workdir) == samples(expected)
    assert bests(workdir) == bests(expected)


def test_a_signal_in_a_step_that_is_due_for_an_evaluation(monkeypatch, corpus, tmp_path, expected):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = loop.Loop.train_one_step

        def stopped_in_step_3(self):
            original(self)
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(loop.Loop, "train_one_step", stopped_in_step_3)
        summary = run(corpus, workdir)
    assert (summary["status"], summary["step"]) == ("interrupted", 3)
    assert scores(workdir) == {}
    run(corpus, workdir)
    assert scores(workdir) == scores(expected)
    assert samples(workdir) == samples(expected)


def test_a_signal_while_a_batch_is_fetched(monkeypatch, corpus, tmp_path):
    next_batch = SplitBatches.next

    def stopped(self, step, params):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, step, params)

    monkeypatch.setattr(SplitBatches, "next", stopped)
    summary = run(corpus, tmp_path / "run")
    assert (summary["status"], summary["step"]) == ("interrupted", 2)


def test_a_finished_run_owes_nothing(monkeypatch, corpus, expected):
    monkeypatch.setattr(loop, "Loop", None)  # would be needed to evaluate
    before = (expected / "metrics.jsonl").read_bytes()
    assert run(corpus, expected)["status"] == "finished"
    assert (expected / "metrics.jsonl").read_bytes() == before


def test_the_summary_says_which_step_its_scores_are_of(monkeypatch, corpus, tmp_path):
    fail_at(monkeypatch, "held_out_scores", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    summary = run(corpus, tmp_path / "run")
    assert (summary["step"], summary["evaluated_step"]) == (6, 3)


def test_signals_that_were_ignored_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    stop.grace = True
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested


def test_a_second_signal_ends_at_once():
    stop = Stop()
    stop.grace = True
    with stop.interruptible(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(Interrupted):
        stop.poll()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGHUP)


class SignalWhenFreed:
    """What is raised in `__del__`, as in callbacks of the garbage collector, Python gives up."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "step"),
    [("start_or_resume", 0), ("held_out_scores", 3)],  # before there is a loop, and in it
)
def test_a_signal_whose_exception_is_lost_still_stops(monkeypatch, corpus, tmp_path, name, step):
    workdir = tmp_path / "run"
    fail_at(monkeypatch, name, 1, SignalWhenFreed)
    summary = run(corpus, workdir)
    assert (summary["status"], summary["step"]) == ("interrupted", step)
    assert (workdir / "checkpoints" / str(step)).is_dir()


def test_a_file_in_the_place_of_samples_is_set_aside(corpus, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("in its place")
    assert run(corpus, tmp_path / "run")["status"] == "finished"
    assert "samples: not a folder; set aside as" in capsys.readouterr().err
    assert (tmp_path / "run" / "samples" / "3.txt").is_file()


def test_a_file_in_the_place_of_the_best_checkpoint_ends_nothing(corpus, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").write_text("in its place")
    assert run(corpus, tmp_path / "run", sample_tokens=0)["status"] == "finished"
    told = "the best checkpoint, of step 3, could not be written: "
    assert f"{told}{tmp_path / 'run' / 'best'}: Not a directory" in capsys.readouterr().err


def test_a_sample_for_which_there_is_no_space_ends_nothing(corpus, tmp_path, capsys, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(files, "write_text", only_for("samples", full, files.write_text))
    assert run(corpus, tmp_path / "run")["status"] == "finished"
    assert "3.txt could not be written: No space left on device" in capsys.readouterr().err


def only_for(folder, error, write):
    def write_or_raise(path, text):
        if path.parent.name == folder:
            raise error
        write(path, text)

    return write_or_raise
