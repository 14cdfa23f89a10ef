"""The decoder: causality, isolation, and the equality of two ways to compute the same thing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES as CHECKPOINTS
from conftest import make_config, on_cpu, random_params

from gptjax.model import head, transformer
from gptjax.model import init as model_init
from gptjax.model.kv_cache import init_cache
from gptjax.ops import activation
from gptjax.ops.attention.backends import BACKENDS, backends_for
from gptjax.ops.attention.mask import Mask

FAMILIES = {
    "gpt2": {},
    "gpt2_exact_nobias": dict(mlp="gelu_exact", bias="none"),
    "llama": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        kv_heads=2,
        tie_embeddings=False,
    ),
    "everything": dict(
        positions="rope",
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_context=8,
        norm="rmsnorm",
        mlp="swiglu",
        bias="qkv",
        kv_heads=1,
        qk_norm=True,
        logit_softcap=20.0,
        sliding_window=5,
        head_dim=12,
    ),
    "gemma2": CHECKPOINTS["gemma2"],
}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    config = make_config(model=dict(vocab_size=65, context=24, **FAMILIES[request.param])).model
    config = on_cpu(config)
    return config, random_params(config), jax.random.randint(jax.random.key(2), (2, 24), 0, 65)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, **kwargs):
    return head.unembed(config, params, transformer.apply(config, params, tokens, **kwargs)[0])


@functools.partial(jax.jit, static_argnums=0)
def cached(config, params, tokens, cache, start):
    x, cache = transformer.apply(config, params, tokens, cache=cache, start_B=start)
    return head.unembed(config, params, x), cache


def test_no_logit_depends_on_a_later_token(family):
    config, params, tokens = family
    embedded = jax.nn.one_hot(tokens, config.padded_vocab)

    def logits(onehot):  # tokens as one-hot rows: gradients say exactly what each logit sees
        table = params["embed"]["tokens"]
        shifted = {
            **params,
            "embed": {**params["embed"], "tokens": jnp.concatenate([onehot[0] @ table, table])},
        }
        return logits_of(
            dataclasses.replace(config, vocab_size=config.vocab_size),
            {**shifted, "head": {"kernel": table}},
            jnp.arange(24)[None],
        )[0].sum(-1)

    seen = np.abs(np.asarray(jax.jit(jax.jacrev(logits))(embedded))).sum((1, 3)) > 0
    expected = np.tril(np.ones((24, 24), bool))
    if config.sliding_window and not config.alternate_windows and config.layers == 2:
        expected &= ~np.tril(np.ones((24, 24), bool), -2 * (config.sliding_window - 1) - 1)
    np.testing.assert_array_equal(seen, expected)


# the kernels of TPUs and GPUs: tests/ops/test_attention.py
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("splash", "cudnn")])
def test_documents_in_one_window_are_isolated(family, backend):
    config, params, tokens = family
    config = dataclasses.replace(config, attention=backend, attention_block=7)
    segments = jnp.array([[1] * 9 + [2] * 15] * 2)
    positions = jnp.array([[*range(9), *range(15)]] * 2)
    packed = logits_of(config, params, tokens, segment_ids=segments, positions=positions)
    other = tokens.at[:, :9].set((tokens[:, :9] + 1) % 65)
    np.testing.assert_array_equal(
        packed[:, 9:],
        logits_of(config, params, other, segment_ids=segments, positions=positions)[:, 9:],
    )
    alone = logits_of(config, params, tokens[:, 9:])
    np.testing.assert_allclose(packed[:, 9:], alone, atol=3e-5)
    assert (
        np.abs(packed[:, 9:] - logits_of(config, params, tokens)[:, 9:]).max() > 1e-3
    )  # without segments they do see one another


VARIANTS = {
    "scan": dict(scan_layers=True),
    "remat full": dict(remat="full"),
    "remat dots": dict(remat="dots"),
    "scan, remat": dict(scan_layers=True, remat="full"),
    "reference attention": dict(attention="reference"),
    "blockwise": dict(attention="blockwise", attention_block=7),
    "blockwise, one block": dict(attention="blockwise", attention_block=64),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_give_the_same_loss_and_gradients(family, variant):
    config, params, tokens = family
    segments = jnp.array([[1] * 5 + [2] * 19, [1] * 24])

    @functools.partial(jax.jit, static_argnums=1)
    def loss(params, config):
        x, _ = transformer.apply(config, params, tokens, segment_ids=segments)
        return head.token_cross_entropy(config, params, x, tokens, jnp.ones((2, 24)), chunk=8)

    changed = dataclasses.replace(config, **VARIANTS[variant])
    assert changed != config
    expected, expected_grads = jax.value_and_grad(loss)(params, config)
    found, grads = jax.value_and_grad(loss)(params, changed)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(expected_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * (1 + np.abs(a).max()))


def test_remat_and_scan_really_change_the_program():
    config = make_config().model
    params = jax.eval_shape(lambda: model_init.init_params(config, jax.random.key(0)))
    text = {}
    for name, changes in {
        "plain": {},
        "remat": dict(remat="full"),
        "scan": dict(scan_layers=True),
    }.items():
        changed = dataclasses.replace(config, **changes)
        text[name] = str(
            jax.make_jaxpr(
                lambda p, c=changed: transformer.apply(c, p, jnp.zeros((1, 16), jnp.int32))[0]
            )(params)
        )
    assert "remat" in text["remat"] and "remat" not in text["plain"]
    assert "scan" in text["scan"] and "scan" not in text["plain"]


def test_cache_equals_full_forward_on_ragged_rows(family):
    config, params, tokens = family
    expected = logits_of(config, params, tokens)
    lengths = np.array(
        [5, 11]
    )  # row b has lengths[b] tokens of prompt; the rest is padding that must not matter
    prompt = jnp.where(jnp.arange(11) < lengths[:, None], tokens[:, :11], 7)
    got, cache = cached(config, params, prompt, init_cache(config, 2, 24), jnp.zeros(2, jnp.int32))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got[row, :n], expected[row, :n], atol=3e-5)
    for i in range(13):
        at = jnp.asarray(lengths + i)
        got, cache = cached(config, params, tokens[jnp.arange(2), at][:, None], cache, at)
        np.testing.assert_allclose(got[:, 0], expected[jnp.arange(2), at], atol=3e-5)


def test_loss_at_init_is_that_of_a_uniform_guess(family):
    config, _, _ = family
    tokens = jax.random.randint(jax.random.key(3), (8, 24), 0, config.vocab_size)

    @jax.jit
    def total():
        params = model_init.init_params(config, jax.random.key(5))
        x, _ = transformer.apply(config, params, tokens)
        return head.token_cross_entropy(
            config, params, x, jnp.roll(tokens, -1, 1), jnp.ones((8, 24)), chunk=12
        )

    assert abs(float(total()) / (8 * 24) / math.log(config.vocab_size) - 1) < 0.01


def test_bfloat16_stays_close_and_keeps_float32_logits(family):
    config, params, tokens = family
    low = logits_of(dataclasses.replace(config, dtype="bfloat16"), params, tokens)
    assert low.dtype == jnp.float32
    full = logits_of(config, params, tokens)
    assert float(jnp.sqrt(jnp.mean((low - full) ** 2)) / jnp.std(full)) < 0.05


def test_padded_vocabulary_gets_no_probability():
    config = on_cpu(make_config(model=dict(vocab_size=65, vocab_multiple=128)).model)
    params = random_params(config)
    params["embed"]["tokens"] = params["embed"]["tokens"].at[65:].set(50.0)
    x = jax.random.normal(jax.random.key(1), (1, 16, 32))
    tight = {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"][:65]}}
    loss = lambda c, p: head.token_cross_entropy(
        c, p, x, jnp.full((1, 16), 3), jnp.ones((1, 16)), chunk=4
    )
    np.testing.assert_allclose(
        loss(config, params), loss(dataclasses.replace(config, vocab_multiple=1), tight), rtol=1e-6
    )


def test_blockwise_memory_is_linear_in_the_number_of_keys():
    """No array of T x S elements appears in the compiled forward and backward pass."""
    t = 512
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, t, 1, 1, 8), (1, t, 1, 8), (1, t, 1, 8))
    ]

    def loss(q, k, v, backend):
        return backends_for("cpu")[backend](q, k, v, Mask(jnp.arange(t)[None]), block=32).sum()

    def peak(backend):
        compiled = (
            jax.jit(jax.grad(lambda q, k, v: loss(q, k, v, backend), argnums=(0, 1, 2)))
            .lower(*shapes)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak("xla") >= t * t * 4
    assert peak("blockwise") < t * t * 4 / 2


def test_gelu_rounds_once():
    x, g = (jnp.linspace(-5, 5, 301).astype("bfloat16"), jnp.linspace(1, 2, 301).astype("bfloat16"))
    value, back = jax.vjp(activation.gelu_recomputed, x)
    expected, expected_back = jax.vjp(activation.gelu_recomputed, x.astype("float32"))
    assert np.array_equal(value, expected.astype("bfloat16"))
    assert np.array_equal(back(g)[0], expected_back(g.astype("float32"))[0].astype("bfloat16"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_are_known_also_where_a_backend_refuses(backend):
    config = make_config(model=dict(attention=backend, dtype="bfloat16")).model
    assert model_init.param_shapes(config) == model_init.param_shapes(make_config().model)
