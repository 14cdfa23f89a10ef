"""Checkpoints: bit-exact, on another mesh, and never from a damaged file."""

import dataclasses
import errno
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, make_config
from helpers import run_steps

from gptjax.checkpoints import store
from gptjax.checkpoints.store import Checkpoints
from gptjax.checkpoints.workdir import fault, load_params, newest_step, steps_in
from gptjax.config.errors import UserError
from gptjax.runtime.mesh import make_mesh
from gptjax.training.setup import make_plan


def trained(config, devices=None, n=2):
    _, state, _, mesh = run_steps(config, devices, n)
    return state, mesh


def places(config, mesh):
    plan = make_plan(config, mesh)
    return plan.state_shapes, plan.state_shardings


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2 of a run on 8 devices, and their states."""
    config = make_config(mesh=dict(data=2, fsdp=2, tensor=2))
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    states = {}
    for n in (1, 2):
        state, _ = trained(config, n=n)
        assert checkpoints.save(state, {"note": n}, wait=True)
        states[n] = jax.device_get(state)
    checkpoints.close()
    return folder, states


@pytest.mark.parametrize(
    "mesh",
    [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8), dict(data=1)],
    ids=["same", "fsdp", "one device"],
)
def test_restore_on_any_mesh_is_exact(saved, tmp_path, mesh):
    folder, states = saved
    copy = shutil.copytree(folder, tmp_path / "checkpoints")
    config = make_config(mesh=mesh)
    device_mesh = make_mesh(config, jax.devices()[: 1 if mesh == dict(data=1) else 8])
    with jax.set_mesh(device_mesh):
        checkpoints = Checkpoints(copy, keep=2)
        state, meta = checkpoints.restore(*places(config, device_mesh))
        checkpoints.close()
    assert meta["note"] == 2
    assert_equal(states[2], state)
    assert state.params["embed"]["tokens"].sharding.mesh == device_mesh


def damage(path, kind, generator):
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del data[generator.randrange(len(data)) :]
    elif kind == "empty":
        data.clear()
    path.write_bytes(data)
    if kind == "missing":
        path.unlink()


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_step_is_never_trained_from(saved, tmp_path, capfd, seed):
    folder, states = saved
    copy = shutil.copytree(folder, tmp_path / "checkpoints")
    generator = random.Random(seed)
    files = sorted(
        p
        for p in (copy / "2").rglob("*")
        if p.is_file()
        and p.stat().st_size
        and p.relative_to(copy / "2").as_posix() not in store._WITHOUT_CHECKSUM
    )
    files.append(copy / "2" / "checksums.json")
    victim = generator.choice(files)
    damage(victim, ("flip", "truncate", "empty", "missing")[seed % 4], generator)
    config = make_config(mesh=dict(data=8))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(copy, keep=2)
        state, meta = checkpoints.restore(*places(config, mesh))
        assert meta["note"] == 1
        assert_equal(states[1], state)
        warning = capfd.readouterr().err
        assert "skipped the checkpoint of step 2" in warning
        assert list((tmp_path / "damaged").iterdir())  # moved aside, not deleted
        assert checkpoints.save(
            dataclasses.replace(state, step=state.step + 1), {"note": "again"}, wait=True
        )  # the step can be written anew
        checkpoints.close()
    assert fault(copy / "2") == ""


def test_readers_skip_damage_without_touching_it(saved, tmp_path, capfd):
    folder, states = saved
    copy = shutil.copytree(folder, tmp_path / "checkpoints")
    damage(next((copy / "2" / "params").rglob("d/*")), "flip", random.Random(0))
    step = newest_step(copy)
    assert step.name == "1"
    assert_equal(states[1].params, load_params(step))
    assert (copy / "2").is_dir()
    shutil.rmtree(copy / "1")
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest_step(copy)


def test_nothing_complete_means_refusal_and_leftovers_mean_nothing(tmp_path, capfd):
    config = make_config()
    mesh = make_mesh(config)
    folder = tmp_path / "checkpoints"
    (folder / "7.orbax-checkpoint-tmp-0").mkdir(parents=True)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, keep=2)
        assert checkpoints.restore(*places(config, mesh)) is None
        assert not (folder / "7.orbax-checkpoint-tmp-0").exists()
        (folder / "7").mkdir()  # an empty step is damage, not a new run
        with pytest.raises(UserError, match="no checkpoint is complete"):
            checkpoints.restore(*places(config, mesh))
        checkpoints.close()


def test_another_model_is_refused_by_name(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "checkpoints")
    config = make_config(model=dict(width=64))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(copy, keep=2)
        with pytest.raises(UserError, match="another model"):
            checkpoints.restore(*places(config, mesh))
        checkpoints.close()


def test_a_failed_save_is_reported_and_the_next_one_succeeds(tmp_path, capfd, monkeypatch):
    config = make_config()
    state, _ = trained(config, n=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write_checksums", full)
    assert not checkpoints.save(state, {}, wait=True)
    assert steps_in(tmp_path / "checkpoints") == []
    told = capfd.readouterr().err
    assert f"could not be written: {tmp_path / 'checkpoints'}: No space left on device" in told
    monkeypatch.undo()
    assert checkpoints.save(state, {}, wait=True)
    assert steps_in(tmp_path / "checkpoints") == [1]
    assert checkpoints.failures == 1
    checkpoints.close()


@pytest.mark.parametrize("failures", [0, 1])
def test_what_a_writer_raises_at_its_end_stops_nothing(tmp_path, capfd, monkeypatch, failures):
    checkpoints = Checkpoints(tmp_path / "best", keep=1)
    checkpoints.failures = failures  # each of which was told
    close = checkpoints._manager.close

    def close_and_raise():
        close()
        raise OSError(errno.ENOSPC, "No space left on device")  # of a thread, without its file

    monkeypatch.setattr(checkpoints._manager, "close", close_and_raise)
    checkpoints.close()
    told = capfd.readouterr().err
    warning = f"warning: at the end of saving: {tmp_path / 'best'}: No space left on device ("
    assert (warning in told) == (not failures)


def test_keep_policy(tmp_path):
    config = make_config()
    state, _ = trained(config, n=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in range(1, 6):
        state.step = jax.numpy.int32(step)
        checkpoints.save(state, {})
    checkpoints.close()
    assert steps_in(tmp_path / "checkpoints") == [4, 5]


FULL = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from gptjax.checkpoints.store import Checkpoints
from gptjax.core.types import TrainState
arrays = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 64)) for i in range(40)}
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
# the kernel refuses to write further
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
state = TrainState(jnp.int32(1), arrays, arrays, jnp.zeros(2, jnp.uint32))
print(checkpoints.save(state, {}, wait=True))
checkpoints.close()
"""


def test_a_save_that_runs_out_of_disk_space_is_told_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr[-3000:]
    assert len(done.stderr.splitlines()) == 1 and f"{tmp_path}: File too large" in done.stderr, (
        done.stderr[-3000:]
    )
    assert steps_in(tmp_path) == []
