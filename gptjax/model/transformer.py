"""The decoder: GPT-2 exactly, and the Llama family by config.

`init_params` makes a nested dict of float32 arrays with the blocks stacked on axis 0; `apply` turns tokens into final hidden
states, `unembed` those into logits; `init_cache` and the `cache` argument serve generation. The Linen modules describe one block.
Dims: B batch, T time, S keys, D width, H query heads, K key/value heads, G = H / K, C head width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.core.types import Array, Params
from gptjax.model.rope import rope_tables, rotate
from gptjax.ops import products, quantized
from gptjax.ops.activation import gelu
from gptjax.ops.attention.backends import BACKENDS
from gptjax.ops.attention.cache import cached_attention, write_cache
from gptjax.ops.attention.mask import Mask
from gptjax.ops.materialize import materialize
from gptjax.ops.norm import normalise


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32."""

    config: ModelConfig
    rms: bool = False  # queries and keys are always RMS-normalised

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, rms = self.config, self.rms or self.config.norm == "rmsnorm"
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = (
            self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            if c.bias == "all" and not rms
            else None
        )
        return normalise(x.astype(jnp.float32), scale, bias, c.norm_eps, not rms).astype(x.dtype)


class Linear(nn.Module):
    """Contracts the last `inputs` axes of x with a kernel of shape x.shape[-inputs:] + features, as one product of matrices.

    Where the parameters hold `rows` (see `quantize.inference_params`) instead of a kernel, those are used; an adapter beside them (`gptjax.lora`) adds its part."""

    features: tuple[int, ...]
    bias: bool
    inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[-self.inputs :], *self.features)
        rows, columns = math.prod(shape[: self.inputs]), math.prod(self.features)
        if self.has_variable("params", "rows"):
            y = quantized.quantized_matmul(x.reshape(-1, rows), self.variables["params"]).astype(
                x.dtype
            )
        else:
            kernel = self.param("kernel", nn.initializers.zeros, shape)
            y = products.matmul(x.reshape(-1, rows), kernel.reshape(rows, columns))
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x.reshape(-1, rows), y, self.variables["params"])
        if self.bias:
            y = products.bias_add(
                y, self.param("bias", nn.initializers.zeros, self.features).reshape(columns)
            )
        return y.reshape(*x.shape[: -self.inputs], *self.features)

    def _adapted(self, x: Array, y: Array, params: Any) -> Array:
        """y [N, out] with the low-rank part of x [N, in] added: fence((x A) B), never the product A B."""
        a, b = (params[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
        if "lora_keep" in params and self.has_rng("dropout"):
            keep = params["lora_keep"]
            x = (
                x
                * jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
                / keep.astype(x.dtype)
            )
        y = y + materialize(x @ a.reshape(-1, a.shape[-1])) @ b.reshape(b.shape[0], -1)
        return y * params["lora_gain"].astype(y.dtype).reshape(-1) if "lora_gain" in params else y


class Attention(nn.Module):
    """Grouped-query attention. The kernel of q, k, v is [D, K, G + 2, C]: each key/value head beside its own queries,
    so that splitting K over devices never separates them."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, positions: Array, mask: Mask, cache: Params | None, train: bool
    ) -> tuple[Array, Params | None]:
        c = self.config
        groups = c.heads // c.kv
        qkv = Linear((c.kv, groups + 2, c.head_width), c.bias != "none", name="qkv")(x_BTD)
        qkv = materialize(qkv)
        q_BTKGC, k_BTKC, v_BTKC = qkv[..., :groups, :], qkv[..., groups, :], qkv[..., groups + 1, :]
        if c.qk_norm:
            q_BTKGC, k_BTKC = (
                Norm(c, rms=True, name="q_norm")(q_BTKGC),
                Norm(c, rms=True, name="k_norm")(k_BTKC),
            )
        if c.positions == "rope":
            cos, sin = rope_tables(c, positions)
            q_BTKGC = rotate(q_BTKGC, cos[:, :, None, None], sin[:, :, None, None])
            k_BTKC = rotate(k_BTKC, cos[:, :, None], sin[:, :, None])
        keep = None
        if train and c.dropout:  # what multiplies the attention weights: 0, or 1 / (1 - dropout)
            shape = (x_BTD.shape[0], c.kv, groups, x_BTD.shape[1], x_BTD.shape[1])
            keep = jax.random.bernoulli(
                self.make_rng("dropout"), 1 - c.dropout, shape
            ) / jnp.float32(1 - c.dropout)
        if cache is None:
            y_BTKGC = BACKENDS[c.attention](
                q_BTKGC, k_BTKC, v_BTKC, mask, block=c.attention_block, keep=keep
            )
        else:
            cache = write_cache(cache, k_BTKC, v_BTKC, mask.q_index[:, 0])
            y_BTKGC = cached_attention(q_BTKGC, cache, mask)
        y_BTHC = y_BTKGC.reshape(*y_BTKGC.shape[:2], c.heads, c.head_width)
        return Linear((c.width,), c.bias in ("all", "attention"), inputs=2, name="out")(
            y_BTHC
        ), cache


class MLP(nn.Module):
    """GELU as in GPT-2 (tanh form), exact GELU, or SwiGLU with gate and up projections in one kernel [D, 2, F]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, bias = self.config, self.config.bias == "all"
        if c.mlp == "swiglu":
            gate_up = materialize(Linear((2, c.mlp_width), bias, name="gate_up")(x_BTD))
            h_BTF = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        else:
            up_BTF = Linear((c.mlp_width,), bias, name="up")(x_BTD)
            h_BTF = (
                gelu(up_BTF) if c.mlp == "gelu" else nn.gelu(materialize(up_BTF), approximate=False)
            )
        return Linear((c.width,), bias, name="down")(materialize(h_BTF))


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)); in parallel, both norms read the same x."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        positions: Array,
        mask: Mask,
        cache: Params | None = None,
        train: bool = False,
    ):
        dropout = nn.Dropout(self.config.dropout, deterministic=not train)
        y, cache = Attention(self.config, name="attn")(
            materialize(Norm(self.config, name="norm1")(x_BTD)), positions, mask, cache, train
        )
        attended_BTD = materialize(x_BTD + dropout(y))
        y = MLP(self.config, name="mlp")(
            materialize(
                Norm(self.config, name="norm2")(x_BTD if self.config.parallel else attended_BTD)
            )
        )
        return materialize(attended_BTD + dropout(y)), cache


def cast(config: ModelConfig, params: Params) -> Params:
    """Weights in the compute dtype; scales of norms stay float32, and rows for inference as they are stored."""
    dtype, kept = jnp.dtype(config.dtype), ("scale", "rows", "row_scale", "lora_gain", "lora_keep")
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if path[-1].key in kept else p.astype(dtype), params
    )


_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: tuple[Params, ...] | None = None,
    start_B: Array | None = None,
    dropout_key: Array | None = None,
) -> tuple[Array, tuple[Params, ...] | None]:
    """Final hidden states [B, T, D] in the compute dtype (normalised, ready for `unembed`) and the updated cache.

    Without a cache: `positions` [B, T] default to 0..T-1; `segment_ids` [B, T] isolate documents; a `dropout_key` turns dropout on.
    With a cache (`init_cache`), row b's tokens stand at the slots start_B[b], start_B[b] + 1, ...; `positions` default to the slots.
    Blocks may be stacked on axis 0 or, for inference, a tuple.
    """
    c = config
    params = cast(c, params)
    slots = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    if start_B is not None:
        slots = slots + start_B[:, None]
    positions = slots if positions is None else positions
    mask = Mask(slots, segment_ids, segment_ids, c.sliding_window)
    x = embed(c, params, tokens_BT)
    if (
        "prompt" in params["embed"]
    ):  # learned vectors stand for the first tokens of each segment (`lora.prompt_tokens`)
        prompt = params["embed"]["prompt"]
        x = jnp.where(
            (positions < len(prompt))[..., None],
            prompt[jnp.minimum(positions, len(prompt) - 1)].astype(x.dtype),
            x,
        )
    if c.positions == "learned":
        x = x + params["embed"]["positions"][positions]
    train = dropout_key is not None and c.dropout > 0
    if dropout_key is not None and train:
        dropped: Any = nn.Dropout(c.dropout, deterministic=False).apply(
            {}, x, rngs={"dropout": jax.random.fold_in(dropout_key, c.layers)}
        )
        x = dropped

    def block(x: Array, layer: tuple[Params, Array, Params | None]) -> Any:
        block_params, number, block_cache = layer
        rngs = (
            {"dropout": jax.random.fold_in(dropout_key, number)}
            if dropout_key is not None
            else None
        )
        return Block(c).apply(
            {"params": block_params}, x, positions, mask, block_cache, train, rngs=rngs
        )

    if c.remat != "none":
        block = jax.checkpoint(block, policy=_REMAT_POLICIES[c.remat])
    if c.scan_layers and cache is None and isinstance(params["blocks"], dict):
        scanned: Any = jax.lax.scan(block, x, (params["blocks"], jnp.arange(c.layers), None))
        x = scanned[0]
    else:
        stacked = isinstance(params["blocks"], dict)
        layers = tree.unstack(params["blocks"]) if stacked else params["blocks"]
        one: Any = block if stacked else jax.jit(block)  # for inference, traced once for all layers
        caches = []
        for i, block_params in enumerate(layers):
            x, layer_cache = one(
                x, (block_params, jnp.asarray(i), None if cache is None else cache[i])
            )
            caches.append(layer_cache)
        cache = None if cache is None else tuple(caches)
    final: Any = Norm(c).apply({"params": params["final_norm"]}, x)
    return materialize(final), cache


def embed(config: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    """Token embeddings [B, T, D] in the compute dtype, without positions."""
    table = params["embed"]
    if "rows" not in table:
        return table["tokens"][tokens_BT]
    x = materialize(table["rows"][tokens_BT]).astype(jnp.float32)
    return (x * table["row_scale"][tokens_BT][..., None] if "row_scale" in table else x).astype(
        config.dtype
    )


def head(params: Params) -> Array:
    """The output table [padded V, D], dequantised where it is kept as rows."""
    table = params["head"] if "head" in params else params["embed"]
    if "rows" in table:
        return quantized.dequantize(table)
    return table["kernel"] if "head" in params else table["tokens"]


def score(params: Params, x: Array) -> Array:
    """What the head on a token says of it, float32 [..., labels]. x [..., D]: hidden states."""
    return jnp.einsum(
        "...D,CD->...C", x.astype(jnp.float32), params["score"]["kernel"].astype(jnp.float32)
    )


def unembed(config: ModelConfig, params: Params, x: Array) -> Array:
    """Logits [..., V] in float32, without the padding of the vocabulary."""
    table = params["head"] if "head" in params else params["embed"]
    if "rows" in table:
        logits = quantized.quantized_matmul(x.reshape(-1, x.shape[-1]), table).reshape(
            *x.shape[:-1], -1
        )
    else:
        logits = jnp.einsum(
            "...D,VD->...V", x, head(params).astype(x.dtype), preferred_element_type=jnp.float32
        )
    return softcap(config, logits[..., : config.vocab_size])


def softcap(config: ModelConfig, logits: Array) -> Array:
    """cap * tanh(logits / cap), where the config has a cap (Gemma 2)."""
    cap = config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits
