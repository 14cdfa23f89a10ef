"""Masks of dropout are the same on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config
from jax.sharding import PartitionSpec as P

from gptjax.model.dropout import RESIDUAL, ROWS, Dropout, keep_mask
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh


@pytest.mark.parametrize("spec", [RESIDUAL, P(ROWS, "context", "tensor"), P(ROWS, "tensor")])
@pytest.mark.parametrize(
    "sizes", [dict(data=8), dict(data=2, fsdp=4), dict(data=1, fsdp=2, tensor=2, context=2)]
)
def test_devices_draw_parts_of_one_mask(spec, sizes):
    mesh = make_mesh(make_config(mesh=sizes))
    whole = (8, 8, 6)
    spec = P(*spec, *[None] * (3 - len(spec)))
    own = jax.sharding.NamedSharding(mesh, spec).shard_shape(whole)
    draw = functools.partial(keep_mask, keep_prob=0.7, own_shape=own, spec=spec)
    of_each = sharding.on_each_device(mesh, draw, in_specs=P(), out_specs=spec)
    key = jax.random.key(3)
    mask = np.asarray(jax.jit(of_each)(key))
    np.testing.assert_array_equal(mask, jax.random.bernoulli(key, 0.7, whole))
    assert 0.6 < mask.mean() < 0.8


def test_what_is_kept_is_divided_by_its_probability():
    rngs = {"dropout": jax.random.key(0)}
    dropped = np.asarray(Dropout(0.3).apply({}, jnp.ones((4, 8, 16)), rngs=rngs))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.7)}
    assert dropped.mean() == pytest.approx(1, abs=0.1)
