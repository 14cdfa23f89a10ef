"""The generation engine: prefill and a decode loop, both compiled, over a plain pytree that is donated from call to call.

A batch is a buffer of tokens [B, S] with a length per row; row b's next token depends on its first length[b] tokens, on its own settings and on
its own key, and on nothing else in the batch. Every token but the last of each row is in the cache: decoding feeds the last one, chooses the next,
and writes it behind. Slots behind a row's length hold leftovers that the causal rule hides until they are overwritten, so
there is no padding to mask. S is a bucket (256, 1024, 4096, ... up to the context), so any prompt length takes two programs a bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import sampling
from gptjax.model import head, transformer
from gptjax.model.kv_cache import init_cache, take_rows
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables

State = dict[str, Any]


SMALLEST_BUCKET = 256


def bucket(length: int, context: int, chunk: int) -> int:
    """Slots for `length` tokens: a power of four times 256, or the context; a multiple of the chunk."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 4
    return -(-min(size, max(context, length)) // chunk) * chunk


@functools.partial(executables.jit, static_argnames=("config", "cache_dtype", "copies"))
def prefill(
    config: ModelConfig,
    params: Any,
    tokens_BS: Array,
    length_B: Array,
    *,
    cache_dtype: str = "",
    copies: int = 1,
) -> Any:
    """The cache of all tokens but the last of each row, each row `copies` times. Its time grows with the longest row."""
    b, s = tokens_BS.shape
    size = min(IMPLEMENTATIONS[config.implementation].prefill_chunk, s)
    cache = init_cache(config, b, s, dtype=cache_dtype)

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        at, cache = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens_BS, at, size, axis=1)
        _, cache = transformer.apply(config, params, piece, cache=cache, start_B=jnp.full((b,), at))
        return at + size, cache

    _, cache = jax.lax.while_loop(
        lambda carry: carry[0] < length_B.max() - 1, body, (jnp.int32(0), cache)
    )
    return cache if copies == 1 else take_rows(cache, jnp.arange(b).repeat(copies), b)


def host_state(
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    seeds: Sequence[int],
    slots: int,
    copies: int = 1,
    made: Sequence[int] = (),
) -> tuple[Any, Any, State]:
    """(tokens [B, slots] and lengths [B] of the prompts, the state before the first new token but for its cache), host arrays. limits: longest length
    of each row, at most `slots`; seeds: one per prompt; copies: rows of each prompt, side by side; `made`: tokens made before, where a text goes on
    in a new window: they are no part of its prompt."""
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    length = np.array([len(p) for p in prompts], np.int32)
    made_rows = np.repeat(np.asarray(made or [0] * len(prompts), np.int32), copies)
    lengths = length.repeat(copies, 0)
    return (
        tokens,
        length,
        {
            "tokens": tokens.repeat(copies, 0),
            "length": lengths,
            "prompt_length": lengths - made_rows,
            "limit": np.repeat(np.asarray(limits, np.int32), copies),
            "made": made_rows,
            "done": np.zeros(len(lengths), bool),
            "logprobs": np.zeros((len(lengths), slots), np.float32),
            "seed": np.repeat(np.asarray(seeds, np.uint32), copies),
            "copy": np.tile(np.arange(copies, dtype=np.uint32), len(prompts)),
        },
    )


def start(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    cache_dtype: str = "",
    copies: int = 1,
    **how: Any,
) -> State:
    """The state before the first new token; `how`: as for `host_state`."""
    tokens, length, state = host_state(prompts, copies=copies, **how)
    cache = prefill(config, params, tokens, length, cache_dtype=cache_dtype, copies=copies)
    return {**jax.device_put(state), "cache": cache}


def row_keys(state: State) -> Array:
    """A key per row, a function of its seed, its copy and how many tokens it has made: of nothing else in the batch."""
    one = lambda seed, copy, made: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), copy), made
    )
    return jax.vmap(one)(state["seed"], state["copy"], state["made"])


def feed(config: ModelConfig, params: Any, state: State, count: int = 1) -> tuple[Array, Any]:
    """Hidden states [B, count, D] after feeding the tokens length - 1, ..., length + count - 2 of each row, and the cache with them."""
    at = state["length"] - 1
    tokens = jnp.take_along_axis(state["tokens"], at[:, None] + jnp.arange(count)[None], axis=1)
    return transformer.apply(config, params, tokens, cache=state["cache"], start_B=at)


def append(state: State, token_B: Array, logprob_B: Array, stops: Array) -> State:
    """The state with one more token in each row that is not done."""
    going, rows, at = ~state["done"], jnp.arange(token_B.shape[0]), state["length"]
    put = lambda array, value: array.at[rows, at].set(jnp.where(going, value, array[rows, at]))
    length = at + going
    done = state["done"] | (token_B == stops[:, None]).any(0) | (length >= state["limit"])
    tokens, logprobs = put(state["tokens"], token_B), put(state["logprobs"], logprob_B)
    return {
        **state,
        "tokens": tokens,
        "logprobs": logprobs,
        "length": length,
        "made": state["made"] + going,
        "done": done,
    }


@functools.partial(
    executables.jit, static_argnames=("config", "active"), donate_argnames=("state",)
)
def advance(
    config: ModelConfig,
    params: Any,
    state: State,
    options: Mapping[str, Array],
    steps: Array,
    *,
    active: frozenset[str],
) -> State:
    """Up to `steps` more tokens in each row; stops early when all rows are done. Log-probabilities are the model's own, before any processor."""

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        i, state = carry
        x, cache = feed(config, params, state)
        logits = head.unembed(config, params, x[:, 0])
        token = sampling.choose(
            sampling.process(logits, options, state, active), options, row_keys(state), active
        )
        logprob = sampling.logprob(logits, token)
        return i + 1, append({**state, "cache": cache}, token, logprob, options["stops"])

    _, state = jax.lax.while_loop(
        lambda c: (c[0] < steps) & ~c[1]["done"].all(), body, (jnp.int32(0), state)
    )
    return state


@functools.partial(executables.jit, static_argnames=("config",))
def logits(config: ModelConfig, params: Any, tokens_BT: Array) -> Array:
    """float32 [B, T, V] of a full forward pass. Columns behind a row's end are garbage and change nothing before them."""
    x, _ = transformer.apply(config, params, tokens_BT)
    return head.unembed(config, params, x)


@functools.partial(executables.jit, static_argnames=("config",))
def token_logprobs(config: ModelConfig, params: Any, tokens_BT: Array) -> tuple[Array, Array]:
    """(log-probability, whether it is the most likely one) of each token given those before it, [B, T - 1]; the logits of one row at a time."""
    x, _ = transformer.apply(config, params, tokens_BT[:, :-1])

    def row(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = piece
        found = head.unembed(config, params, hidden)
        return sampling.logprob(found, targets), jnp.argmax(found, -1) == targets

    return jax.lax.map(row, (x, tokens_BT[:, 1:]))


@functools.partial(executables.jit, static_argnames=("config",))
def head_scores(config: ModelConfig, params: Any, tokens_BT: Array, length_B: Array) -> Array:
    """float32 [B, labels]: what the head says of each row's last token. Columns behind a row's end change nothing."""
    x, _ = transformer.apply(config, params, tokens_BT)
    return head.score(params, jnp.take_along_axis(x, (length_B - 1)[:, None, None], 1)[:, 0])
