"""Schedules, decay and freeze tables, AdamW against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_config, random_params

from gptjax.config.errors import UserError
from gptjax.core import tree
from gptjax.training import optim


def rates(**options):
    config = make_config(optim=dict(lr=1.0, warmup_steps=10, **options), train=dict(steps=110))
    return np.asarray(jax.jit(jax.vmap(optim.make_schedule(config)))(jnp.arange(110)))


def test_schedules():
    for name in optim.SCHEDULES:
        rate = rates(schedule=name, min_lr_ratio=0.1)
        np.testing.assert_allclose(
            rate[:10], np.arange(1, 11) / 10, rtol=1e-6
        )  # the first step already learns
        assert rate[10] == pytest.approx(1.0)
        assert rate[-1] == pytest.approx(1.0 if name == "constant" else 0.1, rel=1e-5)
        assert (np.diff(rate[10:]) <= 1e-7).all()
    wsd = rates(schedule="wsd", min_lr_ratio=0.0, decay_fraction=0.2)
    assert (wsd[10:85] == 1.0).all()
    assert wsd[95] < 0.8
    assert rates(schedule="cosine", min_lr_ratio=0.0)[59] == pytest.approx(0.5, abs=0.02)


def test_decay_and_freeze_by_path():
    config = make_config(
        optim=dict(
            freeze=("embed/.*",), lr=0.1, warmup_steps=0, weight_decay=0.5, max_grad_norm=0.0
        )
    )
    params = random_params(config.model)
    tx = optim.make_optimizer(config, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in tree.flatten(updates).items():
        param = tree.flatten(params)[path]
        decayed = path.endswith("kernel") and not path.startswith("embed/")
        np.testing.assert_allclose(
            update, -0.1 * 0.5 * param if decayed else jnp.zeros_like(param), rtol=1e-5, atol=1e-9
        )


def test_frozen_parameters_have_no_moments_and_no_part_in_the_clip_norm():
    config = make_config(optim=dict(freeze=("embed/.*",), max_grad_norm=1.0))
    params = random_params(config.model)
    state = optim.make_optimizer(config, params).init(params)
    assert tree.size(state) < 2 * (tree.size(params) - tree.size(params["embed"])) + 10
    grads = jax.tree.map(jnp.ones_like, params)
    huge = {**grads, "embed": jax.tree.map(lambda g: g * 1e6, grads["embed"])}
    tx = optim.make_optimizer(config, params)
    a, b = (tx.update(g, tx.init(params), params)[0] for g in (grads, huge))
    np.testing.assert_array_equal(
        a["blocks"]["mlp"]["up"]["kernel"], b["blocks"]["mlp"]["up"]["kernel"]
    )


@pytest.mark.parametrize(
    "options", [dict(freeze=("embd/.*",)), dict(no_decay=("nothing/.*",)), dict(freeze=(".*",))]
)
def test_rules_that_do_nothing_or_everything_are_refused(options):
    config = make_config(optim=options)
    params = jax.eval_shape(lambda: random_params(config.model))
    with pytest.raises(UserError, match="optim"):
        optim.make_optimizer(config, params)


def test_muon_makes_orthogonal_steps_of_matrices_and_adam_steps_of_the_rest():
    config = make_config(
        optim=dict(
            name="muon",
            lr=0.1,
            muon_lr=0.5,
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            schedule="constant",
        )
    )
    params = random_params(config.model)
    tx = optim.make_optimizer(config, params)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for name, shape in (("up", (32, 128)), ("down", (128, 32))):
        singular = np.linalg.svd(
            np.asarray(updates["blocks"]["mlp"][name]["kernel"][0]).reshape(shape), compute_uv=False
        )
        assert (
            singular.max() / singular.min() < 2.5
        )  # five Newton-Schulz steps bring all of them near one value
    qkv = np.linalg.svd(
        np.asarray(updates["blocks"]["attn"]["qkv"]["kernel"][1]).reshape(32, 96), compute_uv=False
    )
    assert qkv.max() / qkv.min() < 2.5
    steps = np.abs(
        updates["embed"]["positions"]
    )  # Adam's first step is the sign of the gradient, times one number
    np.testing.assert_allclose(steps, steps[0, 0], rtol=1e-3)


def test_clip_limits_the_global_norm():
    config = make_config(optim=dict(max_grad_norm=0.5))
    params = random_params(config.model)
    seen = []
    spy = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (seen.append(float(optax.tree.norm(g))) or g, s)
    )
    original = optim.OPTIMIZERS["adamw"]
    optim.OPTIMIZERS["adamw"] = lambda o, rate, decays: spy
    try:
        tx = optim.make_optimizer(config, params)
        tx.update(jax.tree.map(lambda p: 100 * jnp.ones_like(p), params), tx.init(params), params)
    finally:
        optim.OPTIMIZERS["adamw"] = original
    assert seen[0] == pytest.approx(0.5, rel=1e-5)
