"""The train step on one device: accumulation, remat, rules of the parameters, learning."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import FAMILIES, make_config
from helpers import batch_for, run_steps

from gptjax.core import tree
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.training import step as train_step
from gptjax.training.setup import make_plan


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_frozen_parameters_and_rematerialisation_in_bfloat16(one_device, remat):
    def config(remat):
        return make_config(
            model=dict(dtype="bfloat16", remat=remat),
            optim=dict(freeze=("embed/.*", ".*norm.*", ".*/attn/.*")),
        )

    expected, _, _, _ = run_steps(config("none"), one_device)
    losses, _, _, _ = run_steps(config(remat), one_device)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_micro_batches_equal_one_batch_with_unequal_weights(one_device):
    config = make_config()
    expected, state, _, _ = run_steps(config, one_device)
    losses, accumulated, _, _ = run_steps(make_config(train=dict(grad_accum_steps=4)), one_device)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(accumulated.params), strict=True
    ):
        np.testing.assert_allclose(b, a, atol=2e-5)
    weights = batch_for(config).loss_weights.reshape(-1, 4, 16).sum((0, 2))
    assert len(set(weights)) > 1  # a mean of means would differ


def test_every_parameter_has_a_rule():
    for family in FAMILIES.values():
        config = make_config(model=family)
        plan = make_plan(config, make_mesh(config))
        for path in tree.flatten(plan.state_shapes.params):
            tree.first_match(sharding.RULES, path)
    with pytest.raises(ValueError, match="no rule matches"):
        tree.first_match(sharding.RULES, "blocks/new/kernel")


def test_one_batch_overfits(one_device):
    config = make_config(
        train=dict(steps=400),
        optim=dict(lr=1e-2, schedule="constant", weight_decay=0.0),
        model=dict(width=64),
    )
    mesh = make_mesh(config, one_device)
    batch = dataclasses.replace(
        batch_for(config),
        loss_weights=np.ones((8, 16), np.float32),
        segment_ids=np.ones((8, 16), np.int32),
    )
    with jax.set_mesh(mesh):
        plan = make_plan(config, mesh)
        state, frozen = train_step.init_state(plan)
        step = train_step.make_train_step(plan)
        batch = sharding.to_global(mesh, batch)
        for _ in range(400):
            state, metrics = step(state, batch, frozen)
    assert float(metrics["loss"]) < 0.01
