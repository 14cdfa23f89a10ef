"""Products with quantized rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import quantized
from gptjax.runtime import executables


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("count", "width"), [(1, 768), (1, 576), (1, 16), (1, 40), (3, 48), (8, 7), (9, 48), (70, 48)]
)
@pytest.mark.parametrize("features", [1, 5, 24])
def test_a_product_rounds_weights_and_not_activations(weights, count, width, features):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((count, width)).astype(np.float32)
    rows = quantized.quantize_rows(
        jnp.asarray(rng.standard_normal((features, width)), jnp.float32), weights
    )
    exact = x.astype(np.float64) @ np.asarray(quantized.dequantize(rows), np.float64).T
    for product in (
        quantized.matmul_cpu,
        jax.jit(quantized.matmul_cpu),
        executables.jit(quantized.matmul_cpu),
    ):
        np.testing.assert_allclose(
            product(jnp.asarray(x), rows), exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max()
        )


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_one_row_is_multiplied_as_it_is_among_others(weights):
    """Else a near tie depends on how many rows are fed at once, and speculation is not greedy."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 768)), jnp.float32)
    rows = quantized.quantize_rows(
        jnp.asarray(rng.standard_normal((24, 768)), jnp.float32), weights
    )
    product = executables.jit(quantized.matmul_cpu)
    for count in (2, 5, 8):
        np.testing.assert_allclose(
            product(x[:1], rows)[0], product(x[:count], rows)[0], rtol=0, atol=5e-5
        )  # of 100: sums in another order
