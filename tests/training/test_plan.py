"""TrainPlan: what a run needs, from shapes alone."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import make_config, random_params
from helpers import batch_for, run_steps

from gptjax.core.types import Batch
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


class Client:
    """As much of a runtime's client as lowering asks for."""

    platform = "tpu"
    platform_version = runtime_type = "described"

    def process_index(self):
        return 0


@dataclasses.dataclass(frozen=True)
class DescribedTpu:
    """As `jax.experimental.topologies` describes a device that is not present."""

    id: int
    client: Client
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0
    num_cores: int = 1

    @property
    def coords(self):
        return (self.id % 8, self.id // 8, 0)


def test_devices_may_be_described_rather_than_present():
    config = make_config(
        mesh=dict(data=4, fsdp=4, tensor=4), model=dict(width=64), train=dict(batch_size=16)
    )
    client, arrays = Client(), len(jax.live_arrays())
    plan = make_plan(config, make_mesh(config, [DescribedTpu(i, client) for i in range(64)]))
    assert plan.platform == plan.model.implementation == "tpu"
    assert plan.config.model.implementation == "auto"  # as it is stored
    kernel = plan.state_shapes.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 64 // 4, 256 // 4)
    assert "num_partitions = 64" in train_step.lower(plan).as_text()[:200]
    assert len(jax.live_arrays()) <= arrays  # those of other tests may go meanwhile


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
