"""The decoder: GPT-2 exactly; GPT-NeoX, Llama and its relatives, Phi-3 and Gemma 2 by config.

`apply` turns tokens into hidden states: the Linen modules describe one block, `apply` runs it over
the layers, and a hook may see and change what arises on the way (`HOOK_POINTS`). head.py turns
hidden states into logits, scores or a loss; init.py makes the parameters, kv_cache.py the cache
that `apply` takes and returns; layers.py and embed.py have the parts.

Dims: B batch, T time, S keys, D width, H query heads, K key/value heads, G = H / K, C head width,
F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Hook, Params
from gptjax.model import kv_cache
from gptjax.model.dropout import ROWS, Dropout, keep_mask
from gptjax.model.embed import embed
from gptjax.model.kv_cache import Cache
from gptjax.model.layers import Linear, Module, Norm
from gptjax.model.memory import rematerialized, whole_layer
from gptjax.model.rope import rope_tables, rotate
from gptjax.ops import collectives
from gptjax.ops.attention.mask import Mask
from gptjax.ops.attention.reference import reference as reference_attention
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.ops.layer_loop import layer_params, loop

# What a hook is called with, in the order of the forward pass, and the dims of the value. Values of
# all layers but the first and the last rows, whose layer is -1.
HOOK_POINTS: dict[str, str] = {
    "embedding": "BTD",  # what enters the first block: tokens, and learned positions
    "residual": "BTD",  # the residual stream before a block
    "attention_input": "BTD",  # the block's first norm
    "queries": "BTHC",  # after RoPE, before the division by the root of C
    "keys": "BTKC",  # after RoPE
    "values": "BTKC",
    "scores": "BHTS",  # before the softmax; -1e30 where a query must not look
    "pattern": "BHTS",  # after it
    "heads": "BTHC",  # what each head read, before the output product
    "attention_output": "BTD",  # what attention adds to the residual stream
    "residual_middle": "BTD",  # the residual stream between attention and MLP
    "mlp_input": "BTD",  # the block's second norm
    "mlp_before": "BTF",  # hidden units before the activation; of a gated MLP gate and up, BT2F
    "mlp_after": "BTF",  # and after it (and after the gate)
    "mlp_output": "BTD",  # what the MLP adds to the residual stream
    "residual_after": "BTD",  # the residual stream after a block
    "final_norm": "BTD",
}


class Hooked(Module):
    """A module with the hook of its layer: called with a name of `HOOK_POINTS` and a value."""

    hook: Callable[[str, Array], Array] | None = None

    def hooked(self, name: str, value: Array) -> Array:
        return value if self.hook is None else self.hook(name, value)

    def hooked_by_head(self, name: str, value: Array, axis: int) -> Array:
        """Of a value with K and G from `axis` on: the hook sees H in their place."""
        if self.hook is None:
            return value
        by_head = value.reshape(*value.shape[:axis], -1, *value.shape[axis + 2 :])
        return self.hook(name, by_head).reshape(value.shape)


class Attention(Hooked):
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
        q_BTKGC = self.hooked_by_head("queries", q_BTKGC, 2)
        k_BTKC, v_BTKC = self.hooked("keys", k_BTKC), self.hooked("values", v_BTKC)
        if c.query_pre_attn_scalar:  # attention divides by the root of C
            q_BTKGC = q_BTKGC * math.sqrt(c.head_width / c.query_pre_attn_scalar)
        if c.scale_scores_by_layer:
            q_BTKGC = q_BTKGC / (layer + 1)
        if cache is None:
            y_BTKGC = self._backend(
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
        y_BTHC = self.hooked("heads", y_BTHC)
        biased = c.bias in ("all", "attention")
        return Linear(c, (c.width,), biased, inputs=2, partial=True, name="out")(y_BTHC), cache

    @property
    def _backend(self) -> Callable[..., Array]:
        if self.hook is not None:
            by_head = functools.partial(self.hooked_by_head, axis=1)
            return functools.partial(reference_attention, hook=by_head)
        return self.ops.attention[self.config.attention]

    def _dropout(self, of_queries: tuple[int, ...]) -> Array:
        """What multiplies the attention weights: 0, or 1 / (1 - dropout)."""
        b, t, heads, groups, _ = of_queries
        keep_prob = 1 - self.config.dropout
        of_weights = (b, heads, groups, t, t * collectives.size("context"))
        spec = P(ROWS, "tensor", None, "context", None)
        keep = keep_mask(self.make_rng("dropout"), keep_prob, of_weights, spec)
        return keep / jnp.float32(keep_prob)


class MLP(Hooked):
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
        h = self.hooked("mlp_before", h)
        h_BTF = self.hooked("mlp_after", self.ops.activation[c.mlp](h))
        return Linear(c, (c.width,), bias, partial=True, name="down")(h_BTF)


class Block(Hooked):
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
        x_BTD = self.hooked("residual", x_BTD)
        normed_BTD = whole(Norm(c, name="norm1")(x_BTD), length)
        normed_BTD = self.hooked("attention_input", normed_BTD)
        attention = Attention(c, self.hook, name="attn")
        partial_BTD, cache = attention(normed_BTD, positions, mask, cache, train, layer)
        update_BTD = to_residual(partial_BTD)
        if c.post_norms:
            update_BTD = Norm(c, name="post_norm1")(update_BTD)
        update_BTD = self.hooked("attention_output", update_BTD)
        attended_BTD = ops.residual_add(x_BTD, dropout(update_BTD))
        attended_BTD = self.hooked("residual_middle", attended_BTD)
        normed_BTD = whole(Norm(c, name="norm2")(x_BTD if c.parallel else attended_BTD), length)
        normed_BTD = self.hooked("mlp_input", normed_BTD)
        update_BTD = to_residual(MLP(c, self.hook, name="mlp")(normed_BTD))
        if c.post_norms:
            update_BTD = Norm(c, name="post_norm2")(update_BTD)
        update_BTD = self.hooked("mlp_output", update_BTD)
        x_BTD = ops.residual_add(attended_BTD, dropout(update_BTD))
        return self.hooked("residual_after", x_BTD), cache


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
    cache: Cache | None = None,
    start_B: Int[Array, " B"] | None = None,
    dropout_key: Array | None = None,
    hook: Hook | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Final hidden states [B, T, D] in the compute dtype (normalized, ready for `head.unembed`) and
    the updated cache.

    tokens_BT: int32. Without a cache: `positions` [B, T] default to 0..T-1; `segment_ids` [B, T]
    isolate documents; a `dropout_key` turns dropout on. With a cache (`kv_cache.init_cache`), row
    b's tokens stand at the slots start_B[b], start_B[b] + 1, ...; `positions` default to the slots.
    Blocks may be stacked on axis 0 or, for inference, a tuple.

    hook: a pure function `hook(name, value, layer)`, called at `HOOK_POINTS`; what it returns, in
    the same shape, takes the value's place. The blocks are then unrolled, `layer` is a number of
    Python (-1: of no layer), and attention is the reference, whose scores can be seen. Not with a
    cache, nor in a manual region. None: the program has nothing of it.
    """
    if hook is not None and cache is not None:
        raise ValueError("a hook sees whole texts: give no cache")
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
    if hook is not None:
        x_BTD = hook("embedding", x_BTD, -1)

    def block(x_BTD: Array, layer: tuple[Params, Array, Params | None], hook: Any = None) -> Any:
        block_params, number, block_cache = layer
        block_mask = mask
        if c.alternate_windows:
            block_mask = dataclasses.replace(mask, use_window=number % 2 == 0)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        rngs = None if key is None else {"dropout": key}
        variables = {"params": whole_layer(block_params)}
        return Block(c, hook).apply(
            variables, x_BTD, positions, block_mask, block_cache, train, number, rngs=rngs
        )

    x_BTD, cache = _run_blocks(c, block, x_BTD, params["blocks"], cache, hook)
    final: Any = Norm(c).apply({"params": params["final_norm"]}, x_BTD)
    if hook is not None:
        final = hook("final_norm", final, -1)
    return collectives.whole_sequence(final, tokens_BT.shape[1]), cache


def _run_blocks(
    config: ModelConfig, block: Any, x_BTD: Array, blocks: Any, cache: Any, hook: Hook | None
) -> tuple[Array, Any]:
    """The residual stream behind the blocks, in a loop or unrolled, and the new cache."""
    is_stacked = isinstance(blocks, dict)
    of_rows = is_stacked and "rows" in blocks["attn"]["qkv"]
    scanned = config.scan_layers is True and hook is None and is_stacked
    if scanned and (of_rows or cache is not None):
        return _looped(config, block, x_BTD, blocks, cache)
    run = rematerialized(config, block, scanned=scanned) if hook is None else block
    if scanned:
        return jax.lax.scan(run, x_BTD, (blocks, jnp.arange(config.layers), None))[0], None
    if of_rows:
        blocks = tuple(layer_params(blocks, jnp.int32(i)) for i in range(config.layers))
    elif is_stacked:
        blocks = IMPLEMENTATIONS[config.implementation].unstack(blocks)
    elif hook is None:
        run = jax.jit(run)  # for inference: traced once for all layers
    return _unrolled(run, x_BTD, blocks, cache, hook)


def _looped(
    config: ModelConfig, block: Any, x_BTD: Array, blocks: Params, cache: Any
) -> tuple[Array, Params | None]:
    """Stacked blocks one after the other, for inference: a small program, whatever their number."""

    if cache is None:
        without = lambda layer, x: block(x, (layer_params(blocks, layer), layer, None))[0]
        return loop(without, x_BTD, config.layers), None
    rows = cache["k"].shape[1] // config.kv

    def step(layer: Array, carry: tuple[Array, Params]) -> tuple[Array, Params]:
        x_BTD, arrays = carry
        own = cache | arrays | {"row": layer * rows + cache.get("row", 0)}
        x_BTD, own = block(x_BTD, (layer_params(blocks, layer), layer, own))
        return x_BTD, kv_cache.whole(own)

    x_BTD, arrays = loop(step, (x_BTD, kv_cache.joined(cache)), config.layers)
    return x_BTD, cache | kv_cache.apart(arrays, config.layers)


def _unrolled(
    block: Any,
    x_BTD: Array,
    blocks: tuple[Params, ...],
    cache: Any,
    hook: Hook | None,
) -> tuple[Array, tuple[Params, ...] | None]:
    """The blocks one after the other, each with its layer of the cache."""
    new_cache = []
    for i, params in enumerate(blocks):
        layer = (params, jnp.asarray(i), None if cache is None else cache[i])
        own = () if hook is None else (functools.partial(_call, hook, i),)
        x_BTD, layer_cache = block(x_BTD, layer, *own)
        new_cache.append(layer_cache)
    return x_BTD, None if cache is None else tuple(new_cache)


def _call(hook: Hook, layer: int, name: str, value: Array) -> Array:
    return hook(name, value, layer)
