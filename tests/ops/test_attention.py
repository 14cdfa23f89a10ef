"""Every attention backend, on every platform of its row, computes what the reference does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.attention.backends import BACKENDS
from gptjax.ops.attention.mask import Mask
from gptjax.ops.attention.reference import reference

FUNCTIONS = {
    f"{name} on {platform or 'others'}": function
    for name, row in BACKENDS.items()
    for platform, function in row.items()
}
MASKS = {
    "causal": {},
    "packed": {"segments": True},
    "window": {"window": 5},
    "packed window": {"segments": True, "window": 5},
}


def inputs(groups):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 24, 2, groups, 8))
    k, v = (jax.random.normal(key, (2, 24, 2, 8)) for key in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], q.shape)


def mask(window=0, segments=False):
    numbers = jnp.array([[1] * 10 + [2] * 14, [1] * 24]) if segments else None
    return Mask(jnp.arange(24)[None], numbers, numbers, window)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_equal_the_reference(name, kind, groups, softcap):
    q, k, v, cotangent = inputs(groups)

    def value_and_grads(attend):
        attend = functools.partial(attend, mask=mask(**MASKS[kind]), block=7, softcap=softcap)
        value, back = jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)
        return value, *back(cotangent)

    expected = value_and_grads(reference)
    for found, wanted in zip(value_and_grads(FUNCTIONS[name]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
