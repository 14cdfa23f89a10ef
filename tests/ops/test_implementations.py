"""Every implementation of the ops computes what the reference defines; the reference differentiates
forward too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, make_config, on_cpu, random_params

from gptjax.model import head, transformer
from gptjax.model.kv_cache import init_cache
from gptjax.model.quantize import inference_params
from gptjax.ops.implementations import IMPLEMENTATIONS, resolve

MODELS = {
    "gpt2": dict(),
    "gpt2 exact": dict(mlp="gelu_exact", scan_layers=True),
    "llama": dict(
        positions="rope", norm="rmsnorm", mlp="swiglu", bias="none", kv_heads=2, qk_norm=True
    ),
    "gemma2": FAMILIES["gemma2"],
    "capped": dict(logit_softcap=4.0, tie_embeddings=False, remat="full"),
}
FAST = [name for name in IMPLEMENTATIONS if name not in ("reference", "cpu in order")]


def model(name, **settings):
    config = make_config(model=dict(vocab_size=65, **MODELS[name], **settings)).model
    config = dataclasses.replace(config, implementation="reference")
    tokens = jax.random.randint(jax.random.key(0), (3, 16), 0, 65)
    segments = jnp.array([[1] * 16, [1] * 5 + [2] * 11, [1] * 12 + [0] * 4])
    return config, random_params(config), tokens, segments


def loss(config, params, tokens, segments):
    x, _ = transformer.apply(config, params, tokens, segment_ids=segments)
    weights = (segments > 0).astype(jnp.float32)
    return head.token_cross_entropy(config, params, x, tokens, weights, chunk=4)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_equal_the_reference(name, implementation):
    config, params, tokens, segments = model(name)
    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    expected, expected_grads = value_and_grad(config, params, tokens, segments)
    fast = on_cpu(config, implementation)
    value, grads = value_and_grad(fast, params, tokens, segments)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_decoding_and_logprobs_equal_the_reference(implementation, weights, name):
    config, params, tokens, _ = model(name)
    small = inference_params(params, weights=weights)

    def run(config):
        cache = init_cache(config, 3, 16)
        start = jnp.zeros((3,), jnp.int32)
        _, cache = transformer.apply(config, small, tokens[:, :10], cache=cache, start_B=start)
        x, _ = transformer.apply(config, small, tokens[:, 10:11], cache=cache, start_B=start + 10)
        hidden, _ = transformer.apply(config, params, tokens)
        logp = head.token_logprobs(config, params, hidden, tokens, chunk=8)
        return head.unembed(config, small, x), logp

    expected = jax.jit(run, static_argnums=0)(config)
    results = jax.jit(run, static_argnums=0)(on_cpu(config, implementation))
    # accelerators round activations to bfloat16 where they meet int8 weights
    rounded = weights == "int8" and implementation in ("gpu", "tpu")
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.3 if rounded else 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_differentiates_forward(name):
    config, params, tokens, segments = model(name, layers=1)
    of_params = lambda p: loss(config, p, tokens, segments)
    tangent = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape) * 0.1, params)
    _, forward = jax.jvp(of_params, (params,), (tangent,))
    grads = jax.grad(of_params)(params)
    backward = sum(jax.tree.leaves(jax.tree.map(lambda g, t: (g * t).sum(), grads, tangent)))
    np.testing.assert_allclose(forward, backward, rtol=1e-4)

    def of_scale(scale):
        return of_params({**params, "final_norm": {**params["final_norm"], "scale": scale}})

    scale = params["final_norm"]["scale"]
    np.testing.assert_allclose(
        jax.jacfwd(of_scale)(scale), jax.grad(of_scale)(scale), rtol=1e-3, atol=1e-3
    )
    hessian = jax.hessian(of_scale)(scale)
    assert hessian.shape == (32, 32)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-3 * float(jnp.abs(hessian).max()))
    assert float(jnp.abs(hessian).max()) > 0


def test_faster_attention_takes_no_forward_derivative_so_the_reference_really_differs():
    config, params, tokens, segments = model("gpt2", layers=1)
    fast = on_cpu(config, "cpu")
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: loss(fast, p, tokens, segments), (params,), (params,))


def test_rows_are_named_by_platform():
    for platform in ("cpu", "gpu", "tpu"):
        assert resolve("auto", platform=platform) == platform
    assert resolve("auto", platform="METAL") == "gpu"
    assert resolve("reference", platform="cpu") == "reference"
