"""On CPUs a row's sums have one order in a program of any number of rows, as XLA optimizes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import quantized
from gptjax.ops.attention.cache import BLOCK
from gptjax.ops.attention.mask import Mask
from gptjax.ops.categorical import draw
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


@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(3, 3, 64), (2, 1, 16), (4, 1, 64), (2, 8, 80)]
)
def test_attention_over_rows_of_different_lengths(heads, groups, width):
    random, slots = np.random.default_rng(0), 2 * BLOCK
    used = np.array([5, slots, BLOCK, 1, BLOCK + 1, 77, slots - 1, 2] * 2, np.int32)
    cache = {
        "k": random.standard_normal((16 * heads, slots, width)).astype(np.float32) * 3,
        "v": random.standard_normal((16 * heads, width, slots)).astype(np.float32),
    }

    def attend(q, row, used):
        own = cache | {"row": row, "used": used}
        return CPU_IN_ORDER.cached_attention(q, own, Mask(used[:, None] - 1))

    q = random.standard_normal((16, 1, heads, groups, width)).astype(np.float32)
    compiled = jax.jit(attend, compiler_options=OPTIONS)
    alone = [compiled(q[i : i + 1], np.int32(i), used[i : i + 1]) for i in range(16)]
    for n in (8, 16):
        for i in range(0, 16, n):
            together = compiled(q[i : i + n], np.int32(i), used[i : i + n])
            np.testing.assert_array_equal(together, np.concatenate(alone[i : i + n]))


@pytest.mark.parametrize("vocab_size", [257, 5000])
def test_draws(vocab_size):
    logits = np.random.default_rng(0).standard_normal((16, vocab_size)).astype(np.float32)
    compiled = jax.jit(functools.partial(draw, in_order=True), compiler_options=OPTIONS)
    keys = jax.random.split(jax.random.key(0), 16)
    alone = [int(compiled(logits[i : i + 1], keys[i : i + 1])[0]) for i in range(16)]
    assert compiled(logits, keys).tolist() == alone
