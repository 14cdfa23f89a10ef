"""Cross-entropy over chunks against the formula, and its gradient; products of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config, on_cpu, random_params
from jax.sharding import PartitionSpec as P

from gptjax.model import head, transformer
from gptjax.ops import collectives, cross_entropy, products
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_equal_the_formula(chunk, softcap):
    config = on_cpu(make_config(model=dict(vocab_size=65, logit_softcap=softcap)).model)
    params = random_params(config)
    x = jax.random.normal(jax.random.key(1), (3, 16, 32))
    targets = jax.random.randint(jax.random.key(2), (3, 16), 0, 65)
    weights = jax.random.uniform(jax.random.key(3), (3, 16)).at[0, :5].set(0.0)

    def formula(params, x):
        log_probs = jax.nn.log_softmax(head.unembed(config, params, x), axis=-1)
        return -(
            weights * jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        ).sum()

    ours = lambda params, x: head.token_cross_entropy(
        config, params, x, targets, weights, chunk=chunk
    )
    expected, expected_grads = jax.jit(jax.value_and_grad(formula, argnums=(0, 1)))(params, x)
    found, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(expected_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_loss_of_a_scaled_sum_scales_its_gradient():
    config = on_cpu(make_config().model)
    params = random_params(config)
    x, ones = jax.random.normal(jax.random.key(1), (2, 16, 32)), jnp.ones((2, 16))
    loss = lambda x, factor: (
        factor
        * head.token_cross_entropy(config, params, x, jnp.zeros((2, 16), jnp.int32), ones, chunk=8)
    )
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(x, 0.25) * 4, jax.jit(jax.grad(loss))(x, 1.0), rtol=1e-6
    )


def test_whole_logits_never_exist():
    """The largest array of the compiled gradient is smaller than the batch's logits."""
    config = on_cpu(make_config(model=dict(vocab_size=2048, context=64)).model)
    params = random_params(config)
    chunk = cross_entropy.chunk_length(config.padded_vocab, 8, 64)
    assert 64 % chunk == 0
    assert chunk < 64
    loss = lambda p, x: head.token_cross_entropy(
        config, p, x, jnp.zeros((8, 64), jnp.int32), jnp.ones((8, 64)), chunk=8
    )
    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((8, 64, 32))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 64 * 2048 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_by_rows_have_the_gradients_of_any_product(dtype):
    """What CPUs do with bfloat16, against what all other devices do; a frozen factor
    costs nothing to save."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, w, b, g = (
        jax.random.normal(k, shape).astype(dtype)
        for k, shape in zip(keys, ((6, 4), (4, 5), (5,), (6, 5)), strict=True)
    )

    def seen(ops, *which):
        def loss(x, w, b):
            return (ops.bias_add(ops.matmul(x, w), b) * g).sum(dtype=jnp.float32)

        step = jax.jit(jax.value_and_grad(loss, which)).lower(x, w, b)
        return [
            step.as_text().count(name) for name in ("LayoutConstraint", " stablehlo.dot_general")
        ], step.compile()(x, w, b)

    kinds = ((0, 1, 2), (0,), (1, 2))
    expected = [seen(IMPLEMENTATIONS["gpu"], *which) for which in kinds]  # plain products
    for (plain, (value, grads)), which in zip(expected, kinds, strict=True):
        counts, (found, found_grads) = seen(IMPLEMENTATIONS["cpu"], *which)
        factors = len({0, 1} & set(which))
        assert plain == [0, 1 + factors]
        assert counts == (
            [factors, 1 + len(which)] if dtype == "bfloat16" else plain
        )  # the bias's is a product too
        np.testing.assert_allclose(found, value, rtol=1e-6)
        for ours, theirs in zip(found_grads, grads, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(
                ours.astype(np.float32),
                theirs.astype(np.float32),
                rtol=1e-6 if dtype == "float32" else 2e-2,
                atol=1e-6,
            )
    assert np.array_equal(products.transposed_copy(x), x.T)
    if dtype == "bfloat16":
        saved = [
            leaf.shape
            for leaf in jax.tree.leaves(jax.vjp(lambda x: products.by_rows_matmul(x, w), x)[1])
        ]
        assert (4, 5) in saved and (6, 4) not in saved


@pytest.mark.parametrize(
    "settings", [{}, {"scan_layers": True, "remat": "full"}], ids=["plain", "scan_layers"]
)
def test_a_model_by_rows_has_the_gradients_of_any_device(settings):
    config = make_config(model=dict(vocab_size=65, dtype="bfloat16", **settings)).model
    params, tokens = random_params(config), jax.random.randint(jax.random.key(0), (2, 16), 0, 65)

    def gradient(config):
        def loss(params):
            x, _ = transformer.apply(config, params, tokens)
            return head.token_cross_entropy(
                config, params, x, tokens, jnp.ones(tokens.shape), chunk=4
            )

        step = jax.jit(jax.grad(loss)).lower(params)
        return step.as_text().count("LayoutConstraint"), step.compile()(params)

    plain, expected = gradient(on_cpu(config, "gpu"))
    constraints, found = gradient(on_cpu(config))
    assert plain == 0 and constraints >= 10
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= 0.02 * np.linalg.norm(theirs) + 1e-6


def loss_of_rows(x, table, targets, weights):
    return cross_entropy.chunked(
        x, table, targets, weights, vocab_size=90, softcap=5.0, chunk=4, cpu=True
    )


@pytest.mark.parametrize("over_vocabulary", [False, True], ids=["positions", "vocabulary"])
def test_shares_of_devices_are_the_loss_and_gradients_of_one(over_vocabulary, monkeypatch):
    """The table is split by vocabulary and by columns, rows and positions of x by the rest; some
    of the last device's part of the vocabulary is padding."""
    calls = []
    by_blocks = cross_entropy._forward_over_vocabulary
    monkeypatch.setattr(
        cross_entropy, "_forward_over_vocabulary", lambda *a: calls.append(1) or by_blocks(*a)
    )
    monkeypatch.setattr(cross_entropy, "_TABLE_GRADIENT_BYTES", 0 if over_vocabulary else 1 << 30)
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", 16 * 12)  # four blocks on a device
    keys = jax.random.split(jax.random.key(0), 4)
    x, table = jax.random.normal(keys[0], (4, 16, 8)), jax.random.normal(keys[1], (96, 8))
    targets = jax.random.randint(keys[2], (4, 16), 0, 90)
    weights = jax.random.uniform(keys[3], (4, 16)).at[0, :5].set(0.0)

    def of_device(x, table, targets, weights):
        loss, grads = jax.value_and_grad(loss_of_rows, (0, 1))(x, table, targets, weights)
        loss = collectives.total(loss, *sharding.AXES)
        d_x = collectives.total(grads[0], "tensor")
        return loss, d_x, collectives.total(grads[1], "data", "context")

    mesh = make_mesh(make_config(mesh=dict(data=1, fsdp=2, tensor=2, context=2)))
    rows, table_spec = sharding.BATCH, P("tensor", "fsdp")
    step = sharding.on_each_device(
        mesh,
        of_device,
        in_specs=(rows, table_spec, rows, rows),
        out_specs=(P(), rows, table_spec),
    )
    loss, d_x, d_table = jax.jit(step)(x, table, targets, weights)
    assert bool(calls) == over_vocabulary

    def formula(x, table):
        return cross_entropy.reference(x, table, targets, weights, vocab_size=90, softcap=5.0)

    expected, (expected_x, expected_table) = jax.value_and_grad(formula, (0, 1))(x, table)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(d_x, expected_x, atol=1e-5)
    np.testing.assert_allclose(d_table, expected_table, atol=1e-5)
    assert not np.asarray(d_table[90:]).any()
