"""Cross-entropy over chunks against the formula, and its gradient; products of matrices and theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config, random_params

from gptjax import losses, model, products


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_equal_the_formula(chunk, softcap):
    config = make_config(model=dict(vocab_size=65, logit_softcap=softcap)).model
    params = random_params(config)
    x = jax.random.normal(jax.random.key(1), (3, 16, 32))
    targets = jax.random.randint(jax.random.key(2), (3, 16), 0, 65)
    weights = jax.random.uniform(jax.random.key(3), (3, 16)).at[0, :5].set(0.0)

    def formula(params, x):
        log_probs = jax.nn.log_softmax(model.unembed(config, params, x), axis=-1)
        return -(weights * jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]).sum()

    ours = lambda params, x: losses.token_cross_entropy(config, params, x, targets, weights, chunk=chunk)
    expected, expected_grads = jax.jit(jax.value_and_grad(formula, argnums=(0, 1)))(params, x)
    found, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(expected_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_loss_of_a_scaled_sum_scales_its_gradient():
    config = make_config().model
    params = random_params(config)
    x, ones = jax.random.normal(jax.random.key(1), (2, 16, 32)), jnp.ones((2, 16))
    loss = lambda x, factor: factor * losses.token_cross_entropy(config, params, x, jnp.zeros((2, 16), jnp.int32), ones, chunk=8)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x, 0.25) * 4, jax.jit(jax.grad(loss))(x, 1.0), rtol=1e-6)


def test_whole_logits_never_exist():
    """The largest array of the compiled gradient is smaller than the batch's logits."""
    config = make_config(model=dict(vocab_size=2048, context=64)).model
    params = random_params(config)
    chunk = losses.chunk_length(config, 8, 64, 0)
    assert 64 % chunk == 0
    assert chunk < 64
    loss = lambda p, x: losses.token_cross_entropy(config, p, x, jnp.zeros((8, 64), jnp.int32), jnp.ones((8, 64)), chunk=8)
    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((8, 64, 32))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 64 * 2048 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_by_rows_have_the_gradients_of_any_product(dtype, monkeypatch):
    """What one CPU device does with bfloat16, against what every other device does; a frozen factor costs nothing to save."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, w, b, g = (jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, ((6, 4), (4, 5), (5,), (6, 5)), strict=True))

    def loss(x, w, b):
        return (products.plus(products.matmul(x, w), b) * g).sum(dtype=jnp.float32)

    def seen(*which):
        return jax.jit(jax.value_and_grad(loss, which))(x, w, b)

    monkeypatch.setattr(products, "_by_rows", lambda *operands: False)
    expected = [seen(*which) for which in ((0, 1, 2), (0,), (1, 2))]
    monkeypatch.setattr(products, "_by_rows", lambda *operands: True)
    for (value, grads), which in zip(expected, ((0, 1, 2), (0,), (1, 2)), strict=True):
        found, found_grads = seen(*which)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        for ours, theirs in zip(found_grads, grads, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=1e-6 if dtype == "float32" else 2e-2, atol=1e-6)
    assert np.array_equal(products.turned(x), x.T)
    saved = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda x: products.matmul(x, w), x)[1])]
    assert (4, 5) in saved and (6, 4) not in saved
