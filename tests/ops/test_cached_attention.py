"""Attention of one query over a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.attention.cache import BLOCK, cached_attention_cpu, write_cache
from gptjax.ops.attention.mask import Mask


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_query_reads_a_cache_as_the_definition_does(dtype, groups):
    rng = np.random.default_rng(0)
    batch, heads, width, slots, last = 2, 3, 64, 96, np.array([[5], [95]], np.int32)
    q = rng.standard_normal((batch, 1, heads, groups, width)).astype(np.float32)
    k, v = rng.standard_normal((2, batch * heads, slots, width)).astype(np.float32) * (
        40 if dtype == "int8" else 1
    )
    cache = {
        "k": jnp.asarray(k.round() if dtype == "int8" else k).astype(dtype),
        "v": jnp.asarray(v.round() if dtype == "int8" else v).astype(dtype).swapaxes(1, 2),
    }
    if dtype == "int8":
        cache |= {
            name: jnp.asarray(rng.uniform(0.01, 0.04, (batch * heads, slots)), jnp.float32)
            for name in ("k_scale", "v_scale")
        }
    meant = {n: np.asarray(cache[n], np.float64) for n in ("k", "v")}
    meant["k"] *= np.asarray(cache.get("k_scale", np.ones((batch * heads, slots))))[:, :, None]
    meant["v"] *= np.asarray(cache.get("v_scale", np.ones((batch * heads, slots))))[:, None]
    k, v = (
        meant["k"].reshape(batch, heads, slots, width),
        meant["v"].reshape(batch, heads, width, slots),
    )
    scores = np.einsum("BKGC,BKSC->BKGS", q[:, 0], k) / 8
    scores = np.where(np.arange(slots) <= last[:, :, None, None], scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("BKGS,BKCS->BKGC", probs / probs.sum(-1, keepdims=True), v)[:, None]
    np.testing.assert_allclose(
        jax.jit(cached_attention_cpu)(q, cache, Mask(last)), exact, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_nan_that_a_text_leaves_in_a_row_does_not_reach_the_next_text(dtype):
    cache = {"k": jnp.zeros((2, BLOCK, 8), dtype), "v": jnp.zeros((2, 8, BLOCK), dtype)}
    if dtype == "int8":
        cache |= {name: jnp.zeros((2, BLOCK)) for name in ("k_scale", "v_scale")}

    def feed(cache, value, start):
        cache = cache | {"row": jnp.int32(0), "used": jnp.array([start + 1])}
        new = jnp.full((1, 1, 2, 8), value)
        cache = write_cache(cache, new, new, jnp.array([start]))
        mask = Mask(jnp.array([[start]]), None, None, 0)
        return cache, cached_attention_cpu(jnp.ones((1, 1, 2, 1, 8)), cache, mask)

    cache, of_nan = feed(cache, jnp.nan, 40)
    assert np.isnan(of_nan).all()  # its own text is not taken for a sound one
    np.testing.assert_allclose(feed(cache, 1.0, 0)[1], 1.0)
