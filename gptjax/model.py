"""The decoder: GPT-2 exactly, and the Llama family by config.

`init_params` makes a nested dict of float32 arrays with the blocks stacked on axis 0; `apply` turns tokens into final hidden
states, `unembed` those into logits; `init_cache` and the `cache` argument serve generation. The Linen modules describe one block.
Dims: B batch, T time, S keys, D width, H query heads, K key/value heads, G = H / K, C head width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax import attention
from gptjax.config import ModelConfig

Array = jax.Array
Params = dict[str, Any]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32."""

    config: ModelConfig
    rms: bool = False  # queries and keys are always RMS-normalised

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if self.rms or c.norm == "rmsnorm":
            return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + c.norm_eps) * scale).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if c.bias == "all" else jnp.zeros(())
        return layer_norm(y, scale, bias, c.norm_eps).astype(x.dtype)


class Linear(nn.Module):
    """Contracts the last `inputs` axes of x with a kernel of shape x.shape[-inputs:] + features."""

    features: tuple[int, ...]
    std: float
    bias: bool
    inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[-self.inputs :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
        rows, columns = math.prod(shape[: self.inputs]), math.prod(self.features)
        batch = x.shape[: -self.inputs]
        y = (x.reshape(*batch, rows) @ kernel.reshape(rows, columns)).reshape(*batch, *self.features)
        return y + self.param("bias", nn.initializers.zeros, self.features) if self.bias else y


class Attention(nn.Module):
    """Grouped-query attention. The kernel of q, k, v is [D, K, G + 2, C]: each key/value head beside its own queries,
    so that splitting K over devices never separates them."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, positions: Array, mask: attention.Mask, cache: Params | None, train: bool) -> tuple[Array, Params | None]:
        c = self.config
        groups = c.heads // c.kv
        qkv = Linear((c.kv, groups + 2, c.head_width), c.init_std, c.bias in ("all", "qkv"), name="qkv")(x_BTD)
        q_BTKGC, k_BTKC, v_BTKC = qkv[..., :groups, :], qkv[..., groups, :], qkv[..., groups + 1, :]
        if c.qk_norm:
            q_BTKGC, k_BTKC = Norm(c, rms=True, name="q_norm")(q_BTKGC), Norm(c, rms=True, name="k_norm")(k_BTKC)
        if c.positions == "rope":
            cos, sin = rope_tables(c, positions)
            q_BTKGC = rotate(q_BTKGC, cos[:, :, None, None], sin[:, :, None, None])
            k_BTKC = rotate(k_BTKC, cos[:, :, None], sin[:, :, None])
        k_BSKC, v_BSKC = k_BTKC, v_BTKC
        if cache is not None:
            k_BSKC = write_cache(cache["k"], k_BTKC, mask.q_index[:, 0])
            v_BSKC = write_cache(cache["v"], v_BTKC, mask.q_index[:, 0])
            cache = {"k": k_BSKC, "v": v_BSKC}
        dropout = functools.partial(nn.Dropout(c.dropout, name="dropout"), deterministic=False) if train and c.dropout else None
        backend = attention.BACKENDS[c.attention]
        y_BTKGC = backend(q_BTKGC, k_BSKC, v_BSKC, mask, block=c.attention_block, dropout=dropout)
        y_BTHC = y_BTKGC.reshape(*y_BTKGC.shape[:2], c.heads, c.head_width)
        return Linear((c.width,), residual_std(c), c.bias == "all", inputs=2, name="out")(y_BTHC), cache


class MLP(nn.Module):
    """GELU as in GPT-2 (tanh form), exact GELU, or SwiGLU with gate and up projections in one kernel [D, 2, F]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, bias = self.config, self.config.bias == "all"
        if c.mlp == "swiglu":
            gate_up = Linear((2, c.mlp_width), c.init_std, bias, name="gate_up")(x_BTD)
            h_BTF = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        else:
            h_BTF = nn.gelu(Linear((c.mlp_width,), c.init_std, bias, name="up")(x_BTD), approximate=c.mlp == "gelu")
        return Linear((c.width,), residual_std(c), bias, name="down")(h_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, positions: Array, mask: attention.Mask, cache: Params | None = None, train: bool = False):
        dropout = nn.Dropout(self.config.dropout, deterministic=not train)
        y, cache = Attention(self.config, name="attn")(Norm(self.config, name="norm1")(x_BTD), positions, mask, cache, train)
        x_BTD = x_BTD + dropout(y)
        return x_BTD + dropout(MLP(self.config, name="mlp")(Norm(self.config, name="norm2")(x_BTD))), cache


def residual_std(config: ModelConfig) -> float:
    """GPT-2 scales the projections into the residual stream by 1 / sqrt(2 L) (Radford et al. 2019, section 2.3)."""
    return config.init_std / math.sqrt(2 * config.layers)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps) * scale + bias


def rope_tables(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """cos, sin [B, T, C/2] in float32 (Su et al. 2021; the llama3 scaling is that of the Llama 3.1 release)."""
    half = config.head_width // 2
    inverse = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling == "linear":
        inverse = inverse / config.rope_factor
    elif config.rope_scaling == "llama3":
        turns = config.rope_original_context * inverse / (2 * math.pi)
        smooth = (turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        inverse = inverse * (smooth + (1 - smooth) / config.rope_factor)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + C/2]), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def write_cache(cache_BSKC: Array, new_BTKC: Array, start_B: Array) -> Array:
    """Rows [start, start + T) of each sequence replaced. The caller makes sure that they exist: XLA would move them back."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), at, axis=0))(cache_BSKC, new_BTKC, start_B)


def init_params(config: ModelConfig, key: Array) -> Params:
    """{"embed": {...}, "blocks": {... [L, ...]}, "final_norm": {...}, "head": ... if untied}, float32."""
    c = config
    tokens_key, positions_key, head_key, blocks_key = jax.random.split(key, 4)
    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    params: Params = {"embed": {"tokens": c.init_std * normal(tokens_key, (c.padded_vocab, c.width))}}
    if c.positions == "learned":
        params["embed"]["positions"] = c.init_std * normal(positions_key, (c.context, c.width))
    x, index = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1), jnp.int32)
    init = lambda k: Block(c).init(k, x, index, attention.Mask(index))["params"]  # noqa: E731
    params["blocks"] = jax.vmap(init)(jax.random.split(blocks_key, c.layers))
    params["final_norm"] = Norm(c).init(key, x)["params"]
    if not c.tied:
        params["head"] = {"kernel": c.init_std * normal(head_key, (c.padded_vocab, c.width))}
    return params


def count_params(config: ModelConfig) -> int:
    """Parameters of the model proper, without the padding of the vocabulary."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    padding = (config.padded_vocab - config.vocab_size) * config.width * (1 if config.tied else 2)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - padding


def cast(config: ModelConfig, params: Params) -> Params:
    """Weights in the compute dtype; scales of norms stay float32."""
    dtype = jnp.dtype(config.dtype)
    return jax.tree_util.tree_map_with_path(lambda path, p: p if path[-1].key == "scale" else p.astype(dtype), params)


@jax.custom_vjp
def unstack(blocks: Params) -> tuple[Params, ...]:
    """Blocks stacked on axis 0 as a tuple. Its gradient is one stack; slicing's own would be a sum of L padded arrays."""
    length = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(jax.tree.map(lambda p, i=i: p[i], blocks) for i in range(length))


unstack.defvjp(lambda blocks: (unstack(blocks), None), lambda _, grads: (jax.tree.map(lambda *g: jnp.stack(g), *grads),))

_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: Params | None = None,
    start_B: Array | None = None,
    dropout_key: Array | None = None,
) -> tuple[Array, Params | None]:
    """Final hidden states [B, T, D] in the compute dtype (normalised, ready for `unembed`) and the updated cache.

    Without a cache: `positions` [B, T] default to 0..T-1; `segment_ids` [B, T] isolate documents; a `dropout_key` turns dropout on.
    With a cache, row b's tokens stand at the slots start_B[b], start_B[b] + 1, ...; `positions` default to the slots.
    """
    c = config
    params = cast(c, params)
    slots = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    if start_B is not None:
        slots = slots + start_B[:, None]
    positions = slots if positions is None else positions
    mask = attention.Mask(slots, segment_ids, segment_ids, c.window)
    x = params["embed"]["tokens"][tokens_BT]
    if c.positions == "learned":
        x = x + params["embed"]["positions"][positions]
    train = dropout_key is not None and c.dropout > 0
    if train:
        x = nn.Dropout(c.dropout, deterministic=False).apply({}, x, rngs={"dropout": jax.random.fold_in(dropout_key, c.layers)})

    def block(x: Array, layer: tuple[Params, Array, Params | None]):
        block_params, number, block_cache = layer
        rngs = {"dropout": jax.random.fold_in(dropout_key, number)} if train else None
        return Block(c).apply({"params": block_params}, x, positions, mask, block_cache, train, rngs=rngs)

    if c.remat != "none":
        block = jax.checkpoint(block, policy=_REMAT_POLICIES[c.remat])
    if c.scan:
        x, cache = jax.lax.scan(block, x, (params["blocks"], jnp.arange(c.layers), cache))
    else:
        caches = []
        for i, block_params in enumerate(unstack(params["blocks"])):
            x, layer_cache = block(x, (block_params, jnp.asarray(i), None if cache is None else jax.tree.map(lambda a, i=i: a[i], cache)))
            caches.append(layer_cache)
        cache = None if cache is None else jax.tree.map(lambda *a: jnp.stack(a), *caches)
    return Norm(c).apply({"params": params["final_norm"]}, x), cache


def head(params: Params) -> Array:
    """The output table [padded V, D]."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["tokens"]


def unembed(config: ModelConfig, params: Params, x: Array) -> Array:
    """Logits [..., V] in float32, without the padding of the vocabulary."""
    logits = jnp.einsum("...D,VD->...V", x, head(params).astype(x.dtype), preferred_element_type=jnp.float32)
    return softcap(config, logits[..., : config.vocab_size])


def softcap(config: ModelConfig, logits: Array) -> Array:
    """cap * tanh(logits / cap), where the config has a cap (Gemma 2)."""
    cap = config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


def init_cache(config: ModelConfig, batch: int, length: int) -> Params:
    """{"k", "v"}: zeros [L, B, length, K, C] in the compute dtype."""
    shape = (config.layers, batch, length, config.kv, config.head_width)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}
