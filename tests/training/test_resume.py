"""Stopped runs: SIGKILL at random moments, SIGTERM, a second run; the numbers stay the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, command

from gptjax.checkpoints.workdir import load_params, newest_step
from gptjax.core import tree
from gptjax.tracking.jsonl import read_jsonl

STEPS = 60


def arguments(corpus, workdir, *extra):
    return [
        sys.executable,
        "-m",
        "gptjax.train",
        *TINY,
        f"--config.data.path={corpus}",
        f"--workdir={workdir}",
        f"--config.train.steps={STEPS}",
        "--config.model.dropout=0.1",
        "--config.train.grad_accum_steps=2",
        "--config.train.log_every=1",
        "--config.train.save_every=4",
        "--config.train.eval_every=0",
        "--config.train.sample_tokens=0",
        *extra,
    ]


def start(args, devices=1):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    process = subprocess.Popen(
        args,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()
        process.stderr.close()


def finish(process):
    """Waits for the end; returns what it said."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-2000:]
    return stderr


def wait_for(process, text):
    """Reads stderr until a line holds `text`; False when the process ended first."""
    for line in process.stderr:
        if text in line:
            return True
    return False


def outcome(workdir):
    losses = {
        r["step"]: r["train/loss"]
        for r in read_jsonl(workdir / "metrics.jsonl")
        if "train/loss" in r
    }
    step = newest_step(workdir / "checkpoints")
    return losses, step.name, tree.flatten(load_params(step))


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1] == b[1]
    for path, array in a[2].items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(b[2][path]), err_msg=path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(
        "".join(
            f"Line {i}: the quick brown fox jumps over {i % 7} lazy dogs.\n" for i in range(400)
        )
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(arguments(text, workdir)))
    result = outcome(workdir)
    assert len(result[0]) == STEPS
    return result


@pytest.mark.slow
def test_killed_ten_times_equals_never_killed(text, tmp_path, uninterrupted):
    generator = random.Random(7)
    kills = 0
    for _ in range(40):
        process = start(arguments(text, tmp_path / "run"))
        running = wait_for(process, "ETA") if kills < 10 else False
        if running:
            time.sleep(generator.uniform(0, 0.25))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        stderr = process.stderr.read()
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr[-2000:]
    assert kills >= 5, "the run finished before it could be killed often enough"
    assert_same(uninterrupted, outcome(tmp_path / "run"))


def test_sigterm_saves_and_the_same_command_goes_on(text, tmp_path, uninterrupted):
    process = start(arguments(text, tmp_path / "run", "--config.train.save_every=0"))
    assert wait_for(process, "ETA")
    process.send_signal(signal.SIGTERM)
    stderr = process.stderr.read()
    assert process.wait(120) == 130, stderr[-2000:]
    assert "SIGTERM: saving" in stderr
    losses, step, _ = outcome(tmp_path / "run")
    assert max(losses) == int(step) < STEPS  # every finished step is in the checkpoint
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    stderr = finish(start(arguments(text, tmp_path / "run", "--config.train.save_every=0")))
    assert f"continue after step {step}" in stderr
    assert_same(uninterrupted, outcome(tmp_path / "run"))


def test_a_second_run_in_the_same_workdir_is_refused(text, tmp_path):
    first = start(arguments(text, tmp_path / "run", "--config.train.steps=100000"))
    assert wait_for(first, "ETA")
    second = start(arguments(text, tmp_path / "run"))
    _, stderr = second.communicate(timeout=120)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert f'"pid": {first.pid}' in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_stop_on_one_mesh_go_on_with_another(text, tmp_path):
    """Over replicas and heads, then over parameters and the sequence, then on one device."""
    never_stopped = arguments(text, tmp_path / "never-stopped", "--config.train.batch_size=16")
    finish(start(never_stopped))
    moved = arguments(text, tmp_path / "run", "--config.train.batch_size=16")
    meshes = [dict(data=4, tensor=2), dict(data=1, fsdp=4, context=2)]
    for mesh, stop_at in zip(meshes, (15, 35), strict=True):
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        finish(start([*moved, *flags, f"--config.train.stop_at={stop_at}"], devices=8))
    finish(start(moved))
    a, b = outcome(tmp_path / "never-stopped")[0], outcome(tmp_path / "run")[0]
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=1e-5)


def test_the_second_start_reads_its_programs_from_the_cache(text, tmp_path):
    done = command("gptjax.train", *arguments(text, tmp_path / "a", "--config.train.stop_at=2")[3:])
    assert "new)" in done.stderr
    again = command(
        "gptjax.train", *arguments(text, tmp_path / "b", "--config.train.stop_at=2")[3:]
    )
    assert ", 0 new)" in again.stderr
