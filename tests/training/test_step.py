"""The train step: accumulation, meshes, one compile, real sharding."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from conftest import make_config
from helpers import batch_for, run_steps

from gptjax.config.errors import UserError
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


FAMILIES = {
    "gpt2": {},
    "llama": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        kv_heads=4,
        tie_embeddings=False,
        scan_layers=True,
    ),
}
MESHES = [
    ("gpt2", dict(data=8)),
    ("gpt2", dict(data=1, fsdp=8)),
    ("gpt2", dict(data=2, tensor=4)),
    ("gpt2", dict(data=2, fsdp=2, tensor=2)),
    ("llama", dict(data=2, fsdp=2, tensor=2)),
]


def options(family):
    return dict(
        model=dict(width=64, heads=4, **FAMILIES[family]),
        train=dict(batch_size=16, grad_accum_steps=2),
    )


@functools.lru_cache
def one_device_losses(family):
    return run_steps(make_config(**options(family)), jax.devices()[:1])[0]


@pytest.mark.parametrize(
    ("family", "mesh"),
    MESHES,
    ids=lambda m: m if isinstance(m, str) else " ".join(f"{k}{v}" for k, v in m.items()),
)
def test_every_mesh_gives_the_losses_of_one_device(family, mesh):
    losses, state, step, grid = run_steps(make_config(**options(family), mesh=mesh), None)
    np.testing.assert_allclose(losses, one_device_losses(family), rtol=1e-5)
    assert step._cache_size() == 1
    parts = grid.shape["fsdp"] * grid.shape["tensor"]
    on_device = [tree.bytes_on_device(state, d) for d in jax.devices()]
    assert len(set(on_device)) == 1
    assert on_device[0] < tree.nbytes(state) * (1.35 / parts)
    for path, leaf in tree.flatten(
        state.opt_state
    ).items():  # moments are split as their parameters are
        if path.endswith("kernel"):
            assert parts == 1 or leaf.addressable_shards[0].data.size < leaf.size


def test_dropout_does_not_depend_on_the_mesh(one_device):
    config = make_config(model=dict(dropout=0.3))
    expected, _, _, _ = run_steps(config, one_device)
    losses, _, _, _ = run_steps(
        make_config(model=dict(dropout=0.3), mesh=dict(data=4, tensor=2)), None
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    without, _, _, _ = run_steps(make_config(), one_device)
    assert abs(without - expected).min() > 1e-4


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (dict(mesh=dict(data=3)), "needs 3 devices and there are 8"),
        (dict(mesh=dict(data=-1, fsdp=3)), "8 devices are not a multiple of 3"),
        (dict(mesh=dict(data=8), train=dict(batch_size=4)), "does not divide train.batch_size"),
        (dict(mesh=dict(data=1, tensor=8)), "model.kv_heads = 4"),
        (
            dict(mesh=dict(data=4, fsdp=2), train=dict(batch_size=8, grad_accum_steps=2)),
            "mesh.data x mesh.fsdp = 8",
        ),
        (
            dict(mesh=dict(data=4, tensor=2), model=dict(vocab_multiple=1)),
            "padded vocabulary of 257",
        ),
    ],
)
def test_illegal_meshes_are_refused_by_name(wrong, part):
    with pytest.raises(UserError, match=re.escape(part)):
        make_mesh(make_config(**wrong))


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
