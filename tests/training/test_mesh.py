"""Every mesh gives the losses and the gradients of one device, whatever is trained."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from conftest import make_config
from mesh_cases import CASES, Stepper, config_of, family, mesh_name, on_one_device, products

from gptjax.config.errors import UserError
from gptjax.core import tree
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.training.setup import make_plan

MESHES = list(products())


def mesh_of(**sizes):
    return dict(data=1, fsdp=1, tensor=1, context=1) | sizes


# For every change: each axis alone, each pair of axes, what differs between axes. All cases on all
# kinds of meshes are in the slow test.
QUICK = [
    ("llama", mesh_of(fsdp=8)),
    ("qwen2", mesh_of(tensor=8)),
    ("classes", mesh_of(context=8)),
    ("qwen3", mesh_of(tensor=2, context=4)),
    ("gemma2", mesh_of(data=2, tensor=2, context=2)),
    ("dropout", mesh_of(fsdp=2, tensor=2, context=2)),
    ("lora", mesh_of(data=2, fsdp=2, tensor=2)),
    ("int8", mesh_of(fsdp=2, tensor=4)),
    ("kto", mesh_of(data=4, context=2)),
    ("grpo", mesh_of(data=2, fsdp=2, context=2)),
]


def assert_sums_near(sums, expected):
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def assert_gradients_near(grads, expected, rtol=1e-5):
    """Each within a share of the largest of its parameter."""
    assert grads.keys() == expected.keys()
    for path, gradient in expected.items():
        tolerance = rtol * np.abs(gradient).max()
        np.testing.assert_allclose(grads[path], gradient, rtol=0, atol=tolerance, err_msg=path)


def assert_documents_are_isolated(stepper):
    """With weights on each row's second document, the tokens of the others change no gradient."""
    batch = stepper.batch(3)
    second = batch.segment_ids == 2
    changed = dataclasses.replace(
        batch, tokens=np.where(second, batch.tokens, (batch.tokens + 7) % 50).astype(np.int32)
    )
    assert stepper.train(batch)[0]["loss"] != stepper.train(changed)[0]["loss"]
    weights = (batch.loss_weights * second).astype(np.float32)
    results = [
        stepper.train(dataclasses.replace(some, loss_weights=weights)) for some in (batch, changed)
    ]
    (sums, grads), (changed_sums, changed_grads) = results
    assert sums == changed_sums
    assert sums["norm"] > 0
    for path, gradient in grads.items():
        np.testing.assert_array_equal(changed_grads[path], gradient, err_msg=path)


def check(name, mesh, *, evaluate):
    expected, expected_evaluation = on_one_device(name)
    stepper = Stepper(config_of(name, mesh))
    config = stepper.plan.config
    for seed, (sums, grads) in enumerate(expected):
        found, found_grads = stepper.train(stepper.batch(seed))
        assert_sums_near(found, sums)
        assert_gradients_near(found_grads, grads)
    dropout = config.model.dropout or config.lora.dropout
    if dropout:  # another step, another mask
        assert stepper.train(stepper.batch(1))[0]["loss"] != found["loss"]
    if not config.task.name and not dropout:
        assert_documents_are_isolated(stepper)
    assert stepper.step._cache_size() == 1
    if evaluate:
        assert_sums_near(stepper.evaluation(stepper.batch(2)), expected_evaluation())
        assert stepper.evaluate._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "mesh"), QUICK, ids=lambda x: x if isinstance(x, str) else mesh_name(x)
)
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(name, mesh):
    check(name, mesh, evaluate=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_case_on_a_fifth_of_the_meshes(name):
    """Which fifth changes from case to case: every mesh has four or five of the cases."""
    number = list(CASES).index(name)
    for mesh in MESHES[number % 5 :: 5]:
        check(name, mesh, evaluate=True)


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_every_device_holds_an_equal_share_of_parameters_and_moments(mesh):
    """`test_plan.py` shows that arrays are placed as the plan says."""
    config = make_config(
        model=dict(width=64, vocab_size=50, vocab_multiple=64, **family("llama")), mesh=mesh
    )
    state = make_plan(config, make_mesh(config)).state_shapes
    on_device = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(state)
    )
    parts = mesh["fsdp"] * mesh["tensor"]
    assert on_device < tree.nbytes(state) * (1.1 / parts)
    for path, moment in tree.flatten(state.opt_state).items():
        if name := sharding.param_path(path):
            assert moment.sharding == tree.flatten(state.params)[name].sharding


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
        (
            dict(mesh=dict(data=1, context=8), data=dict(length=12)),
            "mesh.tensor x mesh.context = 8 does not divide data.length or model.context = 12",
        ),
        (dict(mesh=dict(data=-1, context=-1)), "only one axis may be -1"),
        (dict(mesh=dict(context=0)), "mesh.context = 0: must be 1 or more"),
    ],
)
def test_illegal_meshes_are_refused_by_name(wrong, part):
    with pytest.raises(UserError, match=re.escape(part)):
        make_mesh(make_config(**wrong))
