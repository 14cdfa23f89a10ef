"""Lion and Adafactor: Optax's updates, own settings, learning, resume, states over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_config, random_params
from helpers import batch_for, run_steps

from gptjax.checkpoints.store import Checkpoints
from gptjax.config.errors import UserError
from gptjax.config.optim_config import OPTIMIZERS
from gptjax.core import tree
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.training import optim
from gptjax.training import step as train_step
from gptjax.training.setup import make_plan

FACTORED = dict(name="adafactor", lr=0.03, adafactor_min_dim_size_to_factor=16)
OWN = {"lion": dict(name="lion", lr=1e-3), "adafactor": FACTORED}
MESH = dict(data=2, fsdp=2, tensor=2)


def updates_of(tx, params, steps=3):
    """What `steps` updates with different gradients add to the parameters, step by step."""
    state, updates = tx.init(params), []
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(37 * p + i), params)
        update, state = jax.jit(tx.update)(grads, state, params)
        updates.append(update)
        params = optax.apply_updates(params, update)
    return updates


def bare(**settings):
    """An optimizer without clipping and decay."""
    return dict(max_grad_norm=0.0, weight_decay=0.0, **settings)


@pytest.mark.parametrize("name", list(OWN))
def test_the_update_is_that_of_optax(name):
    config = make_config(optim=bare(**OWN[name]))
    params = random_params(config.model)
    rate = optim.make_schedule(config)
    of_optax = {
        "lion": optax.lion(rate, b1=0.9, b2=0.99, weight_decay=0.0),
        "adafactor": optax.adafactor(rate, min_dim_size_to_factor=16),
    }
    updates = updates_of(optim.make_optimizer(config, params), params)
    for a, b in zip(updates, updates_of(of_optax[name], params), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lion_b1", 0.5),
        ("lion_b2", 0.5),
        ("adafactor_min_dim_size_to_factor", 10_000),
        ("adafactor_decay_rate", 0.5),
        ("adafactor_clipping_threshold", 1.5),
        ("adafactor_momentum", 0.9),
    ],
)
def test_each_setting_changes_the_updates_of_its_optimizer_alone(setting, value):
    for name in OPTIMIZERS:
        settings = OWN.get(name, dict(name=name))
        before, after = (
            make_config(optim=bare(**settings | own)) for own in ({}, {setting: value})
        )
        params = random_params(before.model)
        a, b = (updates_of(optim.make_optimizer(c, params), params) for c in (before, after))
        equal = jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
        assert equal == (not setting.startswith(name)), name


@pytest.mark.parametrize("name", list(OWN))
def test_weight_decay_is_decoupled_and_follows_the_schedule(name):
    settings = OWN[name] | dict(weight_decay=0.5, max_grad_norm=0.0, lr=0.1, warmup_steps=0)
    config = make_config(optim=settings)
    params = random_params(config.model)
    tx = optim.make_optimizer(config, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in tree.flatten(updates).items():
        decayed = not path.endswith(("bias", "scale"))
        expected = -0.1 * 0.5 * tree.flatten(params)[path] * decayed
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-9, err_msg=path)


def test_adafactor_keeps_rows_and_columns_and_no_first_moment():
    params = random_params(make_config().model)

    def state_size(**settings):
        tx = optim.make_optimizer(make_config(optim=settings), params)
        return tree.size(tx.init(params))

    assert state_size(name="adamw") > 2 * tree.size(params)
    assert state_size(name="lion") < 1.01 * tree.size(params)
    assert state_size(**FACTORED) < 0.3 * tree.size(params)
    assert state_size(**FACTORED, adafactor_momentum=0.9) > tree.size(params)


@pytest.mark.parametrize("name", list(OWN))
def test_it_learns(name, one_device):
    settings = OWN[name] | dict(schedule="constant", weight_decay=0.0)
    config = make_config(optim=settings, model=dict(width=64), train=dict(steps=150))
    plan = make_plan(config, make_mesh(config, one_device))
    with jax.set_mesh(plan.mesh):
        state, frozen = train_step.init_state(plan)
        step = train_step.make_train_step(plan)
        batch = sharding.to_global(plan.mesh, batch_for(config))
        for _ in range(150):
            state, metrics = step(state, batch, frozen)
    assert float(metrics["loss"]) < 0.5  # from 5.5


@pytest.mark.parametrize("name", list(OWN))
def test_every_mesh_gives_the_losses_of_one_device(name):
    sections = dict(optim=OWN[name], model=dict(width=64), train=dict(batch_size=16))
    losses, *_ = run_steps(make_config(**sections), jax.devices()[:1])
    on_mesh, _, step, _ = run_steps(make_config(**sections, mesh=MESH), None)
    np.testing.assert_allclose(on_mesh, losses, rtol=1e-5)
    assert step._cache_size() == 1


def test_rows_and_columns_are_split_as_their_parameter_is():
    config = make_config(optim=FACTORED, model=dict(width=64), mesh=MESH)
    plan = make_plan(config, make_mesh(config))
    with jax.set_mesh(plan.mesh):
        state, _ = train_step.init_state(plan)
    moments = {
        path.split("/", 3)[3]: leaf
        for path, leaf in tree.flatten(state.opt_state).items()
        if "/v_" in path
    }
    fractions = {
        "v_row/blocks/mlp/up/kernel": 2,  # [L, D] of [L, D fsdp, F tensor]
        "v_col/blocks/mlp/up/kernel": 2,  # [L, F]
        "v_row/blocks/mlp/down/kernel": 2,
        "v_col/blocks/mlp/down/kernel": 2,
        "v_row/blocks/attn/out/kernel": 2,  # [L, H, C] of [L, H tensor, C, D fsdp]
        "v_col/blocks/attn/out/kernel": 4,  # [L, H, D]
        "v_col/blocks/attn/qkv/kernel": 4,  # [L, D, H, 3] of [L, D fsdp, H tensor, 3, C]
        "v_col/embed/tokens": 2,  # [V] of [V tensor, D fsdp]
        "v_row/embed/tokens": 2,  # [D]
        "v_row/final_norm/scale": 1,  # a placeholder
    }
    for path, parts in fractions.items():
        leaf = moments[path]
        on_device = [tree.bytes_on_device(leaf, device) for device in jax.devices()]
        assert on_device == [leaf.nbytes // parts] * 8, path
    on_first = tree.bytes_on_device(moments, jax.devices()[0])
    assert on_first < 0.5 * tree.nbytes(moments)


def test_of_a_square_matrix_rows_and_columns_keep_different_axes():
    spec = sharding.P(None, "fsdp", "tensor")
    assert sharding.reduced_spec(spec, (2, 8, 8), (2, 8)) == sharding.P(None, "fsdp")
    assert sharding.reduced_spec(spec, (2, 8, 8), (2, 8), first=True) == sharding.P(None, "tensor")
    assert sharding.reduced_spec(spec, (2, 8, 8), (1,)) == sharding.P()


@pytest.mark.parametrize("name", list(OWN))
def test_resume_is_exact(name, tmp_path):
    config = make_config(optim=OWN[name], model=dict(width=64), mesh=MESH)
    plan = make_plan(config, make_mesh(config))
    with jax.set_mesh(plan.mesh):
        step = train_step.lower(plan).compile()
        batches = [sharding.to_global(plan.mesh, batch_for(config, i)) for i in range(4)]
        state, frozen = train_step.init_state(plan)
        for batch in batches[:2]:
            state, _ = step(state, batch, frozen)
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
        assert checkpoints.save(state, {}, wait=True)
        restored, _ = checkpoints.restore(plan.state_shapes, plan.state_shardings)
        checkpoints.close()
        for batch in batches[2:]:
            state, _ = step(state, batch, frozen)
            restored, _ = step(restored, batch, frozen)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restored))


def test_an_optimizer_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"optim\.name = 'lyon'.*did you mean 'lion'"):
        make_config(optim=dict(name="lyon"))
