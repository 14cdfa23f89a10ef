"""On CPUs a row's sums have one order in a program of any number of rows, as XLA optimizes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import quantized
from gptjax.ops.implementations import CPU, CPU_IN_ORDER
from gptjax.runtime import executables

OPTIONS = executables._CPU_OPTIONS | {"xla_backend_optimization_level": 3}


def same_bits(function, x):
    """Whether the first row comes out alike alone and in 8 and 16 rows."""
    compiled = jax.jit(function, compiler_options=OPTIONS)
    alone = np.asarray(compiled(x[:1]))
    return all((np.asarray(compiled(x[:n]))[:1] == alone).all() for n in (8, 16))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_products(dtype):
    random = np.random.default_rng(0)
    matrix = jnp.asarray(random.standard_normal((200, 576)), jnp.float32)
    weight = quantized.quantize_rows(matrix, dtype)
    x = random.standard_normal((16, 576)).astype(np.float32)
    assert same_bits(lambda x: CPU_IN_ORDER.quantized_matmul(x, weight), x)


@pytest.mark.parametrize("center", [False, True])
def test_norms(center):
    x = np.random.default_rng(0).standard_normal((16, 1, 576)).astype(np.float32)
    scale = np.ones(576, np.float32)
    assert same_bits(lambda x: CPU_IN_ORDER.norm(x, scale, None, eps=1e-5, center=center), x)
    assert not same_bits(lambda x: CPU.norm(x, scale, None, eps=1e-5, center=center), x)
