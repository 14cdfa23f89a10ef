"""TrainPlan: what a run needs, from shapes alone, and the command that prints it."""

import json

import jax
import numpy as np
import pytest
from conftest import TINY, command, make_config, random_params
from helpers import batch_for, run_steps

from gptjax.core import tree
from gptjax.core.types import Batch
from gptjax.planning.explain import derived_numbers
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.training import step as train_step
from gptjax.training.setup import make_plan

CASES = {
    "one device": dict(),
    "accumulation": dict(train=dict(grad_accum_steps=2), model=dict(dropout=0.1)),
    "mesh": dict(mesh=dict(data=2, fsdp=2, tensor=2), model=dict(width=64)),
    "muon": dict(optim=dict(name="muon", freeze=("embed/.*",))),
    "adapters": dict(lora=dict(rank=2), train=dict(init_from="base")),
    "int8": dict(lora=dict(rank=2, base="int8"), train=dict(init_from="base")),
}


def plan_of(case):
    config = make_config(**CASES[case])
    return make_plan(config, make_mesh(config, jax.devices()[: 8 if case == "mesh" else 1]))


def arrays_of(plan):
    base = jax.tree.map(np.asarray, random_params(plan.config.model))
    state, frozen = train_step.init_state(plan, base if plan.config.lora.on else None)
    return state, sharding.to_global(plan.mesh, batch_for(plan.config)), frozen


@pytest.mark.parametrize("case", list(CASES))
def test_the_plan_describes_the_arrays_exactly(case):
    plan = plan_of(case)
    with jax.set_mesh(plan.mesh):
        arrays = arrays_of(plan)
    shapes = plan.state_shapes, plan.batch_shapes, plan.frozen_shapes
    assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.mark.parametrize("case", list(CASES))
def test_the_step_lowered_from_shapes_is_the_step_lowered_from_arrays(case):
    plan = plan_of(case)
    with jax.set_mesh(plan.mesh):
        from_arrays = train_step.make_train_step(plan).lower(*arrays_of(plan))
    assert train_step.lower(plan).as_text() == from_arrays.as_text()


def test_a_plan_and_its_lowered_step_make_no_array(monkeypatch):
    """Devices may be described only: nothing may be put on them."""

    def refuse(*args, **kwargs):
        raise AssertionError("an array was made")

    config = make_config(mesh=dict(data=4, tensor=2))
    mesh = make_mesh(config)
    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr(jax, "make_array_from_callback", refuse)
    before = len(jax.live_arrays())
    plan = make_plan(config, mesh)
    assert "stablehlo" in train_step.lower(plan).as_text()
    assert {a.device for a in jax.live_arrays()[before:]} <= {jax.devices()[0]}  # constants, keys
    assert plan.platform == "cpu"
    assert plan.model.implementation == "cpu_sharded"
    assert plan.config.model.implementation == "auto"  # as it is stored


def test_the_compiled_step_takes_real_arrays_and_gives_the_same_losses(one_device):
    config = make_config()
    losses, *_ = run_steps(config, one_device)
    plan = make_plan(config, make_mesh(config, one_device))
    with jax.set_mesh(plan.mesh):
        step = train_step.lower(plan).compile()
        state, frozen = train_step.init_state(plan)
        for i, loss in enumerate(losses):
            batch = sharding.to_global(plan.mesh, batch_for(config, i))
            state, metrics = step(state, batch, frozen)
            assert float(metrics["loss"]) == loss


def test_batches_of_a_task_hold_what_its_objective_needs():
    def fields(**task):
        config = make_config(
            task=task, data=dict(source="jsonl", path="x"), train=dict(init_from="base")
        )
        batch = make_plan(config, make_mesh(config, jax.devices()[:1])).batch_shapes
        assert isinstance(batch, Batch)
        return batch.reference is not None, batch.advantages is not None

    assert fields(name="text") == (False, False)
    assert fields(name="preference", loss="dpo") == (True, False)
    assert fields(name="preference", loss="orpo") == (False, False)
    assert fields(name="grpo") == (False, True)


def test_numbers_that_follow_from_a_config(one_device):
    config = make_config(train=dict(grad_accum_steps=2))
    plan = make_plan(config, make_mesh(config, one_device))
    numbers = {number.name: number for number in derived_numbers(plan, tokens=512)}
    assert numbers["vocabulary"].value == 257
    assert numbers["embedding rows"].value == 384
    assert numbers["tokens per step"].value == 8 * 16
    assert numbers["epochs"].value == 8 * 8 * 16 / 512
    assert numbers["micro-batch"].value == 4
    assert numbers["training state"].value == tree.nbytes(plan.state_shapes)
    assert numbers["decay begins at step"].value == 2


def test_the_command_prints_the_numbers(corpus):
    flags = (*TINY, f"--config.data.path={corpus}", "--config.mesh.data=64")  # not to be had here
    lines = command("gptjax.plan", *flags).stdout.splitlines()
    assert lines[0].split()[:2] == ["vocabulary", "257"]
    numbers = json.loads(command("gptjax.plan", *flags, "--json").stdout)
    assert len(numbers) == len(lines)
    assert {"name", "value", "text", "reason"} == set(numbers[0])


def test_the_flag_that_printed_them_leads_to_the_command():
    done = command("gptjax.train", *TINY, "--explain", check=False)
    assert done.returncode == 2
    assert "no flag '--explain'" in done.stderr
    assert "python -m gptjax.plan --config" in done.stderr
