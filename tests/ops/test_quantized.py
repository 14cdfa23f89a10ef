"""Products with quantized rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import products, quantized
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
@pytest.mark.parametrize(("width", "features"), [(48, 64), (768, 51)])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_row_is_multiplied_bit_for_bit_as_among_others(
    weights, width, features, parts, monkeypatch
):
    """Else a text of a server depends on its neighbours, and speculation is not greedy."""
    monkeypatch.setattr(products, "_PARTS_OF_FEW", parts)  # as processors of both kinds have it
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, width)).astype(np.float32)
    rows = quantized.quantize_rows(
        jnp.asarray(rng.standard_normal((features, width)), jnp.float32), weights
    )
    # optimised also where the tests are not: there are no vectors else
    options = {**executables._CPU_OPTIONS, "xla_backend_optimization_level": 3}
    product = jax.jit(quantized.matmul_cpu, compiler_options=options)
    alone = np.concatenate([product(x[i : i + 1], rows) for i in range(32)])
    for count in (2, 3, 5, 7, 8) if weights == "float32" else (2, 3, 4, 5, 6, 7, 8, 9, 16, 32):
        for start in (0, 32 - count):
            place = slice(start, start + count)
            np.testing.assert_array_equal(product(x[place], rows), alone[place])
