"""The decoder: GPT-2 exactly, and the Llama family by config.

`init_params` makes a nested dict of float32 arrays with the blocks stacked on axis 0; `apply` turns tokens into final hidden
states, `unembed` those into logits; `init_cache` and the `cache` argument serve generation. The Linen modules describe one block.
Dims: B batch, T time, S keys, D width, H query heads, K key/value heads, G = H / K, C head width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax import attention, products, quantize, tree
from gptjax.attention import fence
from gptjax.config import ModelConfig

Array = jax.Array
Params = dict[str, Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(x: Array, scale: Array, bias: Array | None, eps: float, centre: bool) -> Array:
    """LayerNorm (`centre`) or RMSNorm over the last axis, float32 in and out."""
    return _normalise_forward(x, scale, bias, eps, centre)[0]


def _normalise_forward(x: Array, scale: Array, bias: Array | None, eps: float, centre: bool):
    x = x - x.mean(-1, keepdims=True) if centre else x
    inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    unit = fence(x * inverse)  # saved: the backward pass needs nothing else of x
    y = unit * scale
    return (y if bias is None else y + bias), (unit, inverse, scale, bias)


def _normalise_backward(eps: float, centre: bool, saved: tuple, g: Array):
    unit, inverse, scale, bias = saved
    g = fence(g)
    rows = tuple(range(g.ndim - 1))
    gs = g * scale
    dx = gs - unit * (gs * unit).mean(-1, keepdims=True)
    if centre:
        dx = dx - gs.mean(-1, keepdims=True)
    return fence(dx * inverse), (g * unit).sum(rows), None if bias is None else g.sum(rows)


normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The tanh form of GELU, as in GPT-2 (Hendrycks & Gimpel 2016), in float32 inside: each bfloat16 operation would round, and cost two conversions. Its
    gradient recomputes tanh instead of saving intermediates."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_backward(saved: Array, g: Array):
    c, x, g = math.sqrt(2 / math.pi), saved.astype(jnp.float32), fence(g).astype(jnp.float32)
    t = jnp.tanh(c * (x + 0.044715 * x * x * x))
    return (fence((g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))).astype(saved.dtype)),)


gelu.defvjp(lambda x: (fence(gelu(fence(x))), x), _gelu_backward)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32."""

    config: ModelConfig
    rms: bool = False  # queries and keys are always RMS-normalised

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, rms = self.config, self.rms or self.config.norm == "rmsnorm"
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if c.bias == "all" and not rms else None
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
            y = quantize.times_rows(x.reshape(-1, rows), self.variables["params"]).astype(x.dtype)
        else:
            kernel = self.param("kernel", nn.initializers.zeros, shape)
            y = products.matmul(x.reshape(-1, rows), kernel.reshape(rows, columns))
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x.reshape(-1, rows), y, self.variables["params"])
        if self.bias:
            y = products.plus(y, self.param("bias", nn.initializers.zeros, self.features).reshape(columns))
        return y.reshape(*x.shape[: -self.inputs], *self.features)

    def _adapted(self, x: Array, y: Array, params: Any) -> Array:
        """y [N, out] with the low-rank part of x [N, in] added: fence((x A) B), never the product A B."""
        a, b = (params[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
        if "lora_keep" in params and self.has_rng("dropout"):
            keep = params["lora_keep"]
            x = x * jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape) / keep.astype(x.dtype)
        y = y + fence(x @ a.reshape(-1, a.shape[-1])) @ b.reshape(b.shape[0], -1)
        return y * params["lora_gain"].astype(y.dtype).reshape(-1) if "lora_gain" in params else y


class Attention(nn.Module):
    """Grouped-query attention. The kernel of q, k, v is [D, K, G + 2, C]: each key/value head beside its own queries,
    so that splitting K over devices never separates them."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, positions: Array, mask: attention.Mask, cache: Params | None, train: bool) -> tuple[Array, Params | None]:
        c = self.config
        groups = c.heads // c.kv
        qkv = Linear((c.kv, groups + 2, c.head_width), c.bias != "none", name="qkv")(x_BTD)
        qkv = fence(qkv)
        q_BTKGC, k_BTKC, v_BTKC = qkv[..., :groups, :], qkv[..., groups, :], qkv[..., groups + 1, :]
        if c.qk_norm:
            q_BTKGC, k_BTKC = Norm(c, rms=True, name="q_norm")(q_BTKGC), Norm(c, rms=True, name="k_norm")(k_BTKC)
        if c.positions == "rope":
            cos, sin = rope_tables(c, positions)
            q_BTKGC = rotate(q_BTKGC, cos[:, :, None, None], sin[:, :, None, None])
            k_BTKC = rotate(k_BTKC, cos[:, :, None], sin[:, :, None])
        keep = None
        if train and c.dropout:  # what multiplies the attention weights: 0, or 1 / (1 - dropout)
            shape = (x_BTD.shape[0], c.kv, groups, x_BTD.shape[1], x_BTD.shape[1])
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - c.dropout, shape) / jnp.float32(1 - c.dropout)
        if cache is None:
            y_BTKGC = attention.BACKENDS[c.attention](q_BTKGC, k_BTKC, v_BTKC, mask, block=c.attention_block, keep=keep)
        else:
            cache = attention.write_cache(cache, k_BTKC, v_BTKC, mask.q_index[:, 0])
            y_BTKGC = attention.cached(q_BTKGC, cache, mask)
        y_BTHC = y_BTKGC.reshape(*y_BTKGC.shape[:2], c.heads, c.head_width)
        return Linear((c.width,), c.bias in ("all", "attention"), inputs=2, name="out")(y_BTHC), cache


class MLP(nn.Module):
    """GELU as in GPT-2 (tanh form), exact GELU, or SwiGLU with gate and up projections in one kernel [D, 2, F]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, bias = self.config, self.config.bias == "all"
        if c.mlp == "swiglu":
            gate_up = fence(Linear((2, c.mlp_width), bias, name="gate_up")(x_BTD))
            h_BTF = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        else:
            up_BTF = Linear((c.mlp_width,), bias, name="up")(x_BTD)
            h_BTF = gelu(up_BTF) if c.mlp == "gelu" else nn.gelu(fence(up_BTF), approximate=False)
        return Linear((c.width,), bias, name="down")(fence(h_BTF))


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)); in parallel, both norms read the same x."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, positions: Array, mask: attention.Mask, cache: Params | None = None, train: bool = False):
        dropout = nn.Dropout(self.config.dropout, deterministic=not train)
        y, cache = Attention(self.config, name="attn")(fence(Norm(self.config, name="norm1")(x_BTD)), positions, mask, cache, train)
        attended_BTD = fence(x_BTD + dropout(y))
        y = MLP(self.config, name="mlp")(fence(Norm(self.config, name="norm2")(x_BTD if self.config.parallel else attended_BTD)))
        return fence(attended_BTD + dropout(y)), cache


def rope_tables(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """cos, sin [B, T, R/2] in float32 for the R = `rotary_width` leading dims (Su et al. 2021). Scaling of long contexts: linear (Chen et al.
    2023); llama3 (the Llama 3.1 release); yarn (Peng et al. 2023, section 3)."""
    c, half = config, config.rotary_width // 2
    inverse, factor = c.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0
    if c.rope_scaling == "linear":
        inverse = inverse / c.rope_factor
    elif c.rope_scaling == "llama3":
        turns = c.rope_original_context * inverse / (2 * math.pi)
        smooth = jnp.clip((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq), 0.0, 1.0)
        inverse = inverse * (smooth + (1 - smooth) / c.rope_factor)
    elif c.rope_scaling == "yarn":
        # the index of the pair that makes this many turns over the original context
        index = lambda turns: half * math.log(c.rope_original_context / (turns * 2 * math.pi)) / math.log(c.rope_base)
        low, high = max(math.floor(index(c.rope_beta_fast)), 0), min(math.ceil(index(c.rope_beta_slow)), 2 * half - 1)
        kept = 1 - jnp.clip((jnp.arange(half) - low) / (high - low or 1e-3), 0.0, 1.0)
        inverse = inverse * (kept + (1 - kept) / c.rope_factor)
        factor = c.rope_attention_factor or (0.1 * math.log(c.rope_factor) + 1.0)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + R/2]) of the R = 2 * cos.shape[-1] leading dims, in float32; the others pass."""
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    return jnp.concatenate([(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype), x[..., 2 * half :]], axis=-1)


# Standard deviation by path, as a multiple of `init_std`; GPT-2 scales the projections into the residual stream by 1 / sqrt(2 L)
# (Radford et al. 2019, section 2.3). None: the constant that the module itself starts with.
INIT_SCALES: tuple[tuple[str, Any], ...] = (
    (r".*/(scale|bias)", None),
    (r"blocks/(attn/out|mlp/down)/kernel", lambda config: 1 / math.sqrt(2 * config.layers)),
    (r".*", lambda config: 1.0),
)


def init_params(config: ModelConfig, key: Array, *, rows_sharding: jax.sharding.Sharding | None = None) -> Params:
    """{"embed": {...}, "blocks": {... [L, ...]}, "final_norm": {...}}, with "head" if untied, or "score" where the config has labels; float32.

    All normal numbers are one draw of rows of width D, split up afterwards: a draw per parameter takes seconds to compile on a CPU.
    `rows_sharding` spreads those rows over the devices of a mesh.
    """
    c = config
    x, index = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1), jnp.int32)
    block = jax.eval_shape(lambda: Block(c).init(jax.random.key(0), x, index, attention.Mask(index))["params"])
    params: Params = {
        "embed": {"tokens": jnp.zeros((c.padded_vocab, c.width))},
        "blocks": tree.map_with_path(lambda path, p: jnp.full((c.layers, *p.shape), float(path.endswith("scale")), jnp.float32), block),
        "final_norm": tree.map_with_path(
            lambda path, p: jnp.full(p.shape, float(path == "scale"), jnp.float32), jax.eval_shape(Norm(c).init, key, x)["params"]
        ),
    }
    if c.positions == "learned":
        params["embed"]["positions"] = jnp.zeros((c.context, c.width))
    if c.labels:
        params["score"] = {"kernel": jnp.zeros((len(c.labels), c.width))}
    elif not c.tied:
        params["head"] = {"kernel": jnp.zeros((c.padded_vocab, c.width))}
    drawn = {path: p.size // c.width for path, p in tree.flatten(params).items() if tree.first_match(INIT_SCALES, path)}
    total = sum(drawn.values())
    rows = jax.random.normal(key, (total + -total % 1024, c.width))  # in 1,024s, so that meshes divide them
    rows = jax.lax.optimization_barrier(rows if rows_sharding is None else jax.lax.with_sharding_constraint(rows, rows_sharding))
    starts = dict(zip(drawn, itertools.accumulate([0, *drawn.values()]), strict=False))

    def fill(path: str, constant: Array) -> Array:
        scale = tree.first_match(INIT_SCALES, path)
        if scale is None:
            return constant
        return c.init_std * scale(c) * rows[starts[path] : starts[path] + drawn[path]].reshape(constant.shape)

    return tree.map_with_path(fill, params)


@functools.lru_cache(8)
def param_shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of what `init_params` makes."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Parameters of the model proper, without the padding of the vocabulary."""
    shapes = param_shapes(config)
    padding = (config.padded_vocab - config.vocab_size) * config.width * (1 if config.tied or config.labels else 2)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - padding


def cast(config: ModelConfig, params: Params) -> Params:
    """Weights in the compute dtype; scales of norms stay float32, and rows for inference as they are stored."""
    dtype, kept = jnp.dtype(config.dtype), ("scale", "rows", "row_scale", "lora_gain", "lora_keep")
    return jax.tree_util.tree_map_with_path(lambda path, p: p if path[-1].key in kept else p.astype(dtype), params)


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
    mask = attention.Mask(slots, segment_ids, segment_ids, c.window)
    x = embed(c, params, tokens_BT)
    if "prompt" in params["embed"]:  # learned vectors stand for the first tokens of each segment (`lora.prompt_tokens`)
        prompt = params["embed"]["prompt"]
        x = jnp.where((positions < len(prompt))[..., None], prompt[jnp.minimum(positions, len(prompt) - 1)].astype(x.dtype), x)
    if c.positions == "learned":
        x = x + params["embed"]["positions"][positions]
    train = dropout_key is not None and c.dropout > 0
    if dropout_key is not None and train:
        dropped: Any = nn.Dropout(c.dropout, deterministic=False).apply({}, x, rngs={"dropout": jax.random.fold_in(dropout_key, c.layers)})
        x = dropped

    def block(x: Array, layer: tuple[Params, Array, Params | None]) -> Any:
        block_params, number, block_cache = layer
        rngs = {"dropout": jax.random.fold_in(dropout_key, number)} if dropout_key is not None else None
        return Block(c).apply({"params": block_params}, x, positions, mask, block_cache, train, rngs=rngs)

    if c.remat != "none":
        block = jax.checkpoint(block, policy=_REMAT_POLICIES[c.remat])
    if c.scan and cache is None and isinstance(params["blocks"], dict):
        scanned: Any = jax.lax.scan(block, x, (params["blocks"], jnp.arange(c.layers), None))
        x = scanned[0]
    else:
        stacked = isinstance(params["blocks"], dict)
        layers = tree.unstack(params["blocks"]) if stacked else params["blocks"]
        one: Any = block if stacked else jax.jit(block)  # for inference, traced once for all layers
        caches = []
        for i, block_params in enumerate(layers):
            x, layer_cache = one(x, (block_params, jnp.asarray(i), None if cache is None else cache[i]))
            caches.append(layer_cache)
        cache = None if cache is None else tuple(caches)
    final: Any = Norm(c).apply({"params": params["final_norm"]}, x)
    return fence(final), cache


def embed(config: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    """Token embeddings [B, T, D] in the compute dtype, without positions."""
    table = params["embed"]
    if "rows" not in table:
        return table["tokens"][tokens_BT]
    x = fence(table["rows"][tokens_BT]).astype(jnp.float32)
    return (x * table["row_scale"][tokens_BT][..., None] if "row_scale" in table else x).astype(config.dtype)


def head(params: Params) -> Array:
    """The output table [padded V, D], dequantised where it is kept as rows."""
    table = params["head"] if "head" in params else params["embed"]
    if "rows" in table:
        return quantize.matrix(table)
    return table["kernel"] if "head" in params else table["tokens"]


def score(params: Params, x: Array) -> Array:
    """What the head on a token says of it, float32 [..., labels]. x [..., D]: hidden states."""
    return jnp.einsum("...D,CD->...C", x.astype(jnp.float32), params["score"]["kernel"].astype(jnp.float32))


def unembed(config: ModelConfig, params: Params, x: Array) -> Array:
    """Logits [..., V] in float32, without the padding of the vocabulary."""
    table = params["head"] if "head" in params else params["embed"]
    if "rows" in table:
        logits = quantize.times_rows(x.reshape(-1, x.shape[-1]), table).reshape(*x.shape[:-1], -1)
    else:
        logits = jnp.einsum("...D,VD->...V", x, head(params).astype(x.dtype), preferred_element_type=jnp.float32)
    return softcap(config, logits[..., : config.vocab_size])


def softcap(config: ModelConfig, logits: Array) -> Array:
    """cap * tanh(logits / cap), where the config has a cap (Gemma 2)."""
    cap = config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


def init_cache(config: ModelConfig, batch: int, length: int, *, dtype: str = "") -> tuple[Params, ...]:
    """For each layer zeros {"k": [B * K, length, C], "v": [B * K, C, length]} in `dtype` (default: the compute dtype): both products contract the
    last axis and need neither a transpose nor a reshape, which XLA:CPU would pay for with copies; int8 adds {"k_scale", "v_scale"}: float32 [B * K, length]."""
    heads, width, kind = batch * config.kv, config.head_width, dtype or config.dtype
    shapes = {"k": (heads, length, width), "v": (heads, width, length)}
    scales = {"k_scale": (heads, length), "v_scale": (heads, length)} if kind == "int8" else {}
    one = lambda: {**{n: jnp.zeros(s, kind) for n, s in shapes.items()}, **{n: jnp.zeros(s) for n, s in scales.items()}}
    return tuple(one() for _ in range(config.layers))


def take_rows(cache: tuple[Params, ...], rows: Array, batch: int) -> tuple[Params, ...]:
    """The cache of a batch made of these rows of the cache of `batch` rows."""
    return jax.tree.map(lambda a: a.reshape(batch, -1, *a.shape[1:])[rows].reshape(-1, *a.shape[1:]), cache)
