"""Cluster scripts: what they would run, and two processes that really do."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, command

from gptjax.tracking.jsonl import read_jsonl

DASHES = ["--", "--config=configs/debug.py", "--workdir=runs/x y"]


def script(name, *flags):
    return subprocess.run(
        [str(ROOT / "launch" / name), *flags], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_dry_runs_call_the_trainer_with_the_flags_given():
    local = script("local.sh", "--processes=3", "--dry_run", *DASHES)
    assert local.stdout.count("python -m gptjax.train --config=configs/debug.py") == 3
    assert "JAX_PROCESS_ID=2" in local.stdout
    slurm = script("slurm.sh", "--nodes=4", "--partition=gpu", "--dry_run", *DASHES).stdout
    for part in (
        "#SBATCH --nodes=4",
        "#SBATCH --partition=gpu",
        "srun",
        "--distributed",
        "--workdir=runs/x\\ y",
    ):
        assert part in slurm
    tpu = script("tpu_vm.sh", "--name=pod", "--zone=z", "--dry_run", *DASHES).stdout
    assert "--worker=all" in tpu
    assert "gptjax.train" in tpu


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh", "tpu_vm.sh"])
def test_unknown_flags_are_refused(name):
    done = script(name, "--node=3")
    assert done.returncode == 2
    assert "unknown flag --node=3" in done.stderr


@pytest.mark.slow
def test_two_processes_equal_one(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        *TINY,
        f"--config.data.path={corpus}",
        "--config.train.steps=6",
        "--config.train.log_every=1",
        "--config.train.save_every=3",
        "--config.mesh.fsdp=2",
    ]
    both = subprocess.run(
        [
            str(ROOT / "launch" / "local.sh"),
            "--processes=2",
            "--devices=2",
            f"--port={port}",
            "--",
            *flags,
            f"--workdir={tmp_path / 'two'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert both.returncode == 0, both.stderr[-3000:]
    command("gptjax.train", *flags, f"--workdir={tmp_path / 'one'}", devices=4)
    losses = [
        [
            r["train/loss"]
            for r in read_jsonl(tmp_path / name / "metrics.jsonl")
            if "train/loss" in r
        ]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == len(losses[1]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "finished"
