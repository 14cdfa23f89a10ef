"""The compiled programs of `slots.SlotEngine`, over one cache [slots, length] that is donated.

A program works on neighbouring rows of the cache, from a row on that it is told, so one program for
each number of rows is enough. `prefill` feeds a chunk of one row; `decode` makes a few tokens in
each of its rows; `copy_row` copies the beginning of a row. Nothing in a row depends on the rows
beside it, nor on which row of the cache it is.

Dims: N rows of a program, S slots, T chunk, V vocabulary, M most steps of a call, A alternatives.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.generation import loop, sampling
from gptjax.generation.sampling import Settings
from gptjax.generation.slot_rows import read_numbers
from gptjax.model import head, lora, transformer
from gptjax.model.kv_cache import Cache, rows_of, whole
from gptjax.ops.attention.cache import BLOCK
from gptjax.ops.layer_loop import while_loop
from gptjax.ops.products import row_sum
from gptjax.ops.unstack import unstack
from gptjax.runtime import executables

STEPS = 8  # the most steps of a call of `decode`
ALTERNATIVES = 20  # how many the programs give that give some
Alternatives = list[tuple[int, float]]  # (id, log-probability) of tokens, most likely first


class Scored(NamedTuple):
    """What is known of tokens, in arrays with a row for each."""

    logprob: Array  # float32 [...]: the model's own, before any processor
    top_logprobs: Array | None  # float32 [..., A]: of the most likely tokens; None if nobody asks
    top_ids: Array | None  # int32 [..., A]

    def pairs(self, i: int, count: int) -> Alternatives:
        """The most likely tokens in the place of one; of arrays on the host."""
        if self.top_ids is None or self.top_logprobs is None:
            return []
        ids, logprobs = self.top_ids[i, :count].tolist(), self.top_logprobs[i, :count].tolist()
        return list(zip(ids, logprobs, strict=True))


def _score(logits: Array, tokens: Array, alternatives: int) -> Scored:
    peak = logits.max(-1)
    total = peak + jnp.log(row_sum(jnp.exp(logits - peak[..., None])))
    logprob = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - total
    if not alternatives:
        return Scored(logprob, None, None)
    top, ids = jax.lax.top_k(logits, alternatives)
    return Scored(logprob, top - total[..., None], ids.astype(jnp.int32))


def _adapt(params: Params, adapters: Any, gather: Any) -> Params:
    """The parameters with what `gather` makes of each layer's A [adapters, r, D] and B."""
    if not adapters:
        return params

    def layers(part: Any) -> Any:
        if "a" in part:
            return jax.vmap(gather)(part["a"], part["b"])
        return {name: layers(inner) for name, inner in part.items()}

    blocks, own = params["blocks"], layers(adapters)
    if isinstance(blocks, dict):
        return params | {"blocks": lora.merge_trees(blocks, own)}
    return params | {"blocks": tuple(map(lora.merge_trees, blocks, unstack(own)))}


@functools.partial(
    executables.jit, static_argnames=("config", "alternatives"), donate_argnames=("cache",)
)
def prefill(
    config: ModelConfig,
    params: Params,
    adapters: Any,
    cache: Cache,
    tokens: Array,
    row: Array,
    start: Array,
    adapter: Array,
    *,
    alternatives: int,
) -> tuple[Cache, Scored | None]:
    """Feeds the tokens [T] of `tokens` [T + 1] at the slots from `start` on of one row.

    alternatives: -1, or how many to give with the log-probability of the T tokens after each.
    """

    def gather(a: Array, b: Array) -> Params:
        return {"lora_a": a[adapter].T, "lora_b": b[adapter].T}

    params = _adapt(params, adapters, gather)
    chunk = tokens[None, :-1]
    rows = rows_of(cache, row, start[None] + chunk.shape[1])
    x, written = transformer.apply(config, params, chunk, cache=rows, start_B=start[None])
    cache = whole(written)
    if alternatives < 0:
        return cache, None
    return cache, _score(head.unembed(config, params, x)[0], tokens[1:], alternatives)


@functools.partial(
    executables.jit,
    static_argnames=("config", "active", "alternatives"),
    donate_argnames=("cache",),
)
def decode(
    config: ModelConfig,
    params: Params,
    adapters: Any,
    cache: Cache,
    tokens: Array,
    numbers: Array,
    settings: Settings,
    place: Array,
    *,
    active: frozenset[str],
    alternatives: int,
) -> tuple[Cache, Array, tuple[Array, Array] | None]:
    """More tokens in N rows of the cache.

    tokens, numbers: `slot_rows.Batch`. A row that is done writes over its last slot.
    settings: those of `loop.advance` that are not in `numbers`.
    place: int32 [2], the first of the rows, and how many tokens there are at most.

    Returns int32 [N, M, 2], the tokens and the bits of their log-probabilities, and in `Scored`'s
    form the `alternatives` of each, if there are to be any.
    """
    first, steps = place
    state, adapter, numbers_of_settings = read_numbers(tokens, numbers)
    settings = {**settings, **numbers_of_settings}

    def gather(a: Array, b: Array) -> Params:
        return {"lora_rows_a": a[adapter], "lora_rows_b": b[adapter]}

    params = _adapt(params, adapters, gather)
    if config.implementation == "cpu":
        config = dataclasses.replace(config, implementation="cpu in order")
    shape = (len(tokens), STEPS)
    top = (jnp.zeros((*shape, alternatives)), jnp.zeros((*shape, alternatives), jnp.int32))
    made = (jnp.zeros((*shape, 2), jnp.int32), top if alternatives else None)

    def step(carry: Any) -> Any:
        i, state, made = carry
        used = jnp.where(state.done, 0, state.length)
        rows = rows_of(state.cache, first, used)
        x, written = loop.feed(config, params, state.tokens, state.length, rows)
        logits = jax.lax.optimization_barrier(head.unembed(config, params, x[:, 0]))
        processed = sampling.process(logits, settings, state.history, active, in_order=True)
        keys = loop.row_keys(state.seed, state.copy, state.generated)
        token = sampling.choose(processed, settings, keys, active, in_order=True)
        scored = _score(logits, token, alternatives)
        bits = jax.lax.bitcast_convert_type(scored.logprob, jnp.int32)
        now = (jnp.stack([token, bits], -1), scored[1:] if alternatives else None)
        put = lambda all_steps, now: jax.lax.dynamic_update_index_in_dim(all_steps, now, i, 1)
        state = dataclasses.replace(state, cache=whole(written))
        state = loop.append(state, token, None, settings["eos_ids"])
        return i + 1, state, jax.tree.map(put, made, now)

    def unfinished(carry: Any) -> Array:
        return (carry[0] < steps) & ~carry[1].done.all()

    start = (jnp.int32(0), dataclasses.replace(state, cache=cache), made)
    _, state, made = while_loop(unfinished, step, start)
    return state.cache, *made


@functools.partial(executables.jit, static_argnames=("slots",), donate_argnames=("cache",))
def copy_row(cache: Cache, source: Array, target: Array, used: Array, *, slots: int) -> Cache:
    """The cache with the first `used` of a row's slots, rounded up to a block, in another row.

    slots: rows of the cache.
    """

    first = int(isinstance(cache, dict))  # the axis of rows

    def copy(i: Array, cache: Cache) -> Cache:
        def of(path: Any, array: Array) -> Array:
            axis = first + (2 if path[-1].key == "v" else 1)
            size = list(array.shape)
            heads = array.shape[first] // slots
            size[first], size[axis] = heads, BLOCK

            def at(row: Array) -> list[Array]:
                index = [jnp.int32(0)] * array.ndim
                index[first], index[axis] = row * heads, i * BLOCK
                return index

            block = jax.lax.dynamic_slice(array, at(source), size)
            return jax.lax.dynamic_update_slice(array, block, at(target))

        return jax.tree_util.tree_map_with_path(of, cache)

    return jax.lax.fori_loop(0, (used + BLOCK - 1) // BLOCK, copy, cache)
