"""The decoder: GPT-2 exactly; GPT-NeoX, Llama and its relatives, Phi-3 and Gemma 2 by config.

`apply` turns tokens into hidden states: the Linen modules describe one block, `apply` runs it over
the layers. head.py turns hidden states into logits, scores or a loss; init.py makes the parameters,
kv_cache.py the cache that `apply` takes and returns; layers.py and embed.py have the parts.

Dims: B batch, T time, S keys, D width, H query heads, K key/value heads, G = H / K, C head width,
F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.model.dropout import ROWS, Dropout, keep_mask
from gptjax.model.embed import embed
from gptjax.model.layers import Linear, Module, Norm
from gptjax.model.memory import rematerialized, whole_layer
from gptjax.model.rope import rope_tables, rotate
from gptjax.ops import collectives
from gptjax.ops.attention.mask import Mask
from gptjax.ops.implementations import IMPLEMENTATIONS


class Attention(Module):
    """Grouped-query attention.

    The kernel of q, k, v is [D, K, G + 2, C]: each key/value head next to its own queries, so that
    splitting K over devices never separates them. Split over `tensor`, the result is this device's
    part of a sum; queries may be a part of the sequence, keys are those of all of it.
    """

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        positions: Array,
        mask: Mask,
        cache: Params | None,
        train: bool,
        layer: Array | int,
    ) -> tuple[Array, Params | None]:
        c, ops = self.config, self.ops
        groups, heads = c.heads // c.kv, c.kv // collectives.size("tensor")
        biased = c.bias in ("all", "attention", "qkv")
        qkv = Linear(c, (heads, groups + 2, c.head_width), biased, name="qkv")(x_BTD)
        q_BTKGC, k_BTKC, v_BTKC = ops.split_qkv(qkv, groups)
        if c.qk_norm:
            q_BTKGC = Norm(c, per_head=True, name="q_norm")(q_BTKGC)
            k_BTKC = Norm(c, per_head=True, name="k_norm")(k_BTKC)
        if c.positions == "rope":
            cos, sin = rope_tables(c, positions)
            q_BTKGC = rotate(q_BTKGC, cos[:, :, None, None], sin[:, :, None, None])
            k_BTKC = rotate(k_BTKC, cos[:, :, None], sin[:, :, None])
        if c.query_pre_attn_scalar:  # attention divides by the root of C
            q_BTKGC = q_BTKGC * math.sqrt(c.head_width / c.query_pre_attn_scalar)
        if c.scale_scores_by_layer:
            q_BTKGC = q_BTKGC / (layer + 1)
        if cache is None:
            y_BTKGC = ops.attention[c.attention](
                q_BTKGC,
                collectives.gather(k_BTKC, "context", 1),
                collectives.gather(v_BTKC, "context", 1),
                mask,
                block=c.attention_block,
                dropout_BKGTS=self._dropout(q_BTKGC.shape) if train and c.dropout else None,
                softcap=c.attention_softcap,
            )
        else:
            cache = ops.write_cache(cache, k_BTKC, v_BTKC, mask.q_index[:, 0])
            y_BTKGC = ops.cached_attention(q_BTKGC, cache, mask, softcap=c.attention_softcap)
        y_BTHC = y_BTKGC.reshape(*y_BTKGC.shape[:2], heads * groups, c.head_width)
        biased = c.bias in ("all", "attention")
        return Linear(c, (c.width,), biased, inputs=2, partial=True, name="out")(y_BTHC), cache

    def _dropout(self, of_queries: tuple[int, ...]) -> Array:
        """What multiplies the attention weights: 0, or 1 / (1 - dropout)."""
        b, t, heads, groups, _ = of_queries
        keep_prob = 1 - self.config.dropout
        of_weights = (b, heads, groups, t, t * collectives.size("context"))
        spec = P(ROWS, "tensor", None, "context", None)
        keep = keep_mask(self.make_rng("dropout"), keep_prob, of_weights, spec)
        return keep / jnp.float32(keep_prob)


class MLP(Module):
    """An activation between two products, or a gate, with gate and up in one kernel [D, 2, F].

    Split over `tensor`, the result is this device's part of a sum.
    """

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, bias = self.config, self.config.bias in ("all", "mlp")
        hidden = c.mlp_width // collectives.size("tensor")
        if c.gated:
            h = Linear(c, (2, hidden), bias, name="gate_up")(x_BTD)
        else:
            h = Linear(c, (hidden,), bias, name="up")(x_BTD)
        h_BTF = self.ops.activation[c.mlp](h)
        return Linear(c, (c.width,), bias, partial=True, name="down")(h_BTF)


class Block(Module):
    """x + attention(norm(x)), then + mlp(norm(x)); in parallel, both norms read the same x.

    With `post_norms`, what is added is normalized too.
    """

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        positions: Array,
        mask: Mask,
        cache: Params | None = None,
        train: bool = False,
        layer: Array | int = 0,
    ) -> tuple[Array, Params | None]:
        c, ops, length = self.config, self.ops, positions.shape[1]
        whole, to_residual = collectives.whole_sequence, collectives.to_residual
        dropout = Dropout(c.dropout if train else 0.0)
        normed_BTD = whole(Norm(c, name="norm1")(x_BTD), length)
        attention = Attention(c, name="attn")
        partial_BTD, cache = attention(normed_BTD, positions, mask, cache, train, layer)
        update_BTD = to_residual(partial_BTD)
        if c.post_norms:
            update_BTD = Norm(c, name="post_norm1")(update_BTD)
        attended_BTD = ops.residual_add(x_BTD, dropout(update_BTD))
        normed_BTD = whole(Norm(c, name="norm2")(x_BTD if c.parallel else attended_BTD), length)
        update_BTD = to_residual(MLP(c, name="mlp")(normed_BTD))
        if c.post_norms:
            update_BTD = Norm(c, name="post_norm2")(update_BTD)
        return ops.residual_add(attended_BTD, dropout(update_BTD)), cache


# Leaves that keep their dtype: scales of norms, the rows of `model.quantize`, parts of adapters.
_UNCAST = ("scale", "rows", "row_scale", "dora_scale", "keep_prob")


def cast(config: ModelConfig, params: Params) -> Params:
    """Weights in the compute dtype; what `_UNCAST` names stays as it is stored."""
    dtype = jnp.dtype(config.dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if path[-1].key in _UNCAST else p.astype(dtype), params
    )


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: tuple[Params, ...] | None = None,
    start_B: Int[Array, " B"] | None = None,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Params, ...] | None]:
    """Final hidden states [B, T, D] in the compute dtype (normalized, ready for `head.unembed`) and
    the updated cache.

    tokens_BT: int32. Without a cache: `positions` [B, T] default to 0..T-1; `segment_ids` [B, T]
    isolate documents; a `dropout_key` turns dropout on. With a cache (`kv_cache.init_cache`), row
    b's tokens stand at the slots start_B[b], start_B[b] + 1, ...; `positions` default to the slots.
    Blocks may be stacked on axis 0 or, for inference, a tuple.
    """
    c = config
    params = cast(c, params)
    slots = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    slots = slots + collectives.index("context") * tokens_BT.shape[1]
    if start_B is not None:
        slots = slots + start_B[:, None]
    positions = slots if positions is None else positions
    k_segments = None if segment_ids is None else collectives.gather(segment_ids, "context", 1)
    mask = Mask(slots, segment_ids, k_segments, c.sliding_window)
    x_BTD = embed(c, params, tokens_BT, positions)
    train = dropout_key is not None and c.dropout > 0
    if dropout_key is not None and train:
        rngs = {"dropout": jax.random.fold_in(dropout_key, c.layers)}
        dropped: Any = Dropout(c.dropout).apply({}, x_BTD, rngs=rngs)
        x_BTD = dropped

    def block(x_BTD: Array, layer: tuple[Params, Array, Params | None]) -> Any:
        block_params, number, block_cache = layer
        block_mask = mask
        if c.alternate_windows:
            block_mask = dataclasses.replace(mask, use_window=number % 2 == 0)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        rngs = None if key is None else {"dropout": key}
        variables = {"params": whole_layer(block_params)}
        return Block(c).apply(
            variables, x_BTD, positions, block_mask, block_cache, train, number, rngs=rngs
        )

    blocks = params["blocks"]
    scanned = c.scan_layers is True and cache is None and isinstance(blocks, dict)
    block = rematerialized(c, block, scanned=scanned)
    if scanned:
        x_BTD, _ = jax.lax.scan(block, x_BTD, (blocks, jnp.arange(c.layers), None))
    else:
        if isinstance(blocks, dict):
            blocks = IMPLEMENTATIONS[c.implementation].unstack(blocks)
        else:
            block = jax.jit(block)  # for inference: traced once for all layers
        x_BTD, cache = _unrolled(block, x_BTD, blocks, cache)
    final: Any = Norm(c).apply({"params": params["final_norm"]}, x_BTD)
    return collectives.whole_sequence(final, tokens_BT.shape[1]), cache


def _unrolled(
    block: Any, x_BTD: Array, blocks: tuple[Params, ...], cache: tuple[Params, ...] | None
) -> tuple[Array, tuple[Params, ...] | None]:
    """The blocks one after the other, each with its layer of the cache."""
    new_cache = []
    for i, params in enumerate(blocks):
        layer = (params, jnp.asarray(i), None if cache is None else cache[i])
        x_BTD, layer_cache = block(x_BTD, layer)
        new_cache.append(layer_cache)
    return x_BTD, None if cache is None else tuple(new_cache)
