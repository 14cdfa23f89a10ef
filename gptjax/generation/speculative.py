"""Speculative decoding: several tokens are guessed, one pass of the model checks them, and the guesses that it would have made itself are kept.

The text is that of greedy decoding (Leviathan et al. 2023, at temperature 0), in fewer passes. Guesses come from the text so far (prompt
lookup: what followed the last two tokens before) or from a smaller model with the same vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import sampling
from gptjax.generation.loop import State, append, feed
from gptjax.model import head, transformer
from gptjax.runtime import executables


def lookup(tokens_BS: Array, length_B: Array, count: int) -> Array:
    """[B, count] guesses: what followed the latest earlier place where the last two tokens stood; the last token again where there is none."""
    slots = jnp.arange(tokens_BS.shape[1])[None]
    last = jnp.take_along_axis(tokens_BS, length_B[:, None] - 1, 1)
    before = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B[:, None] - 2, 0), 1)
    match = (
        (tokens_BS == last)
        & (jnp.roll(tokens_BS, 1, 1) == before)
        & (slots >= 1)
        & (slots < length_B[:, None] - 1)
    )
    at = jnp.where(match, slots, -1).max(-1, keepdims=True)
    wanted = at + 1 + jnp.arange(count)[None]
    known = (at >= 0) & (wanted < length_B[:, None])
    return jnp.where(
        known, jnp.take_along_axis(tokens_BS, jnp.minimum(wanted, tokens_BS.shape[1] - 1), 1), last
    )


def _draft(config: ModelConfig, params: Any, state: State, count: int) -> tuple[Array, Any]:
    """[B, count] greedy guesses of the smaller model and its cache, which then holds every token but the last guess."""
    # its cache may lack the last two tokens: the final guess of the round before was never fed
    at = jnp.maximum(state["length"] - 2, 0)
    tail = jnp.take_along_axis(state["tokens"], at[:, None] + jnp.arange(2)[None], 1)
    x, cache = transformer.apply(config, params, tail, cache=state["draft_cache"], start_B=at)
    x = jnp.take_along_axis(x, (state["length"] - 1 - at)[:, None, None], 1)
    guesses = []
    for k in range(count):
        guesses.append(jnp.argmax(head.unembed(config, params, x[:, 0]), -1).astype(jnp.int32))
        if k + 1 < count:
            x, cache = transformer.apply(
                config, params, guesses[-1][:, None], cache=cache, start_B=state["length"] + k
            )
    return jnp.stack(guesses, 1), cache


@functools.partial(
    executables.jit,
    static_argnames=("config", "active", "count", "draft_config"),
    donate_argnames=("state",),
)
def advance(
    config: ModelConfig,
    params: Any,
    state: State,
    options: Mapping[str, Array],
    steps: Array,
    *,
    active: frozenset[str],
    count: int = 4,
    draft_config: ModelConfig | None = None,
    draft_params: Any = None,
) -> State:
    """As `decode.advance`, greedy, with `count` guesses a pass: up to `steps` passes. The buffer has `count` slots more than any row's limit."""

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        i, state = carry
        if draft_config is None:
            guesses = lookup(state["tokens"], state["length"], count)
        else:
            guesses, draft_cache = _draft(draft_config, draft_params, state, count)
            state = {**state, "draft_cache": draft_cache}
        rows = jnp.arange(guesses.shape[0])[:, None]
        held = (
            state["tokens"]
            .at[rows, state["length"][:, None] + jnp.arange(count)[None]]
            .set(guesses)
        )
        x, cache = feed(config, params, {**state, "tokens": held}, count + 1)
        state = {**state, "cache": cache}
        agreed, logits = ~state["done"], head.unembed(config, params, x)
        for k in range(count + 1):
            found = logits[:, k]
            token = sampling.choose(
                sampling.process(found, options, state, active), options, rows, active
            )
            logprob = sampling.logprob(found, token)
            after = append(
                {**state, "done": state["done"] | ~agreed}, token, logprob, options["stops"]
            )
            state = {**after, "done": jnp.where(agreed, after["done"], state["done"])}
            if k < count:
                agreed &= (token == guesses[:, k]) & ~state["done"]
        return i + 1, {**state, "passes": state["passes"] + 1}

    _, state = jax.lax.while_loop(
        lambda c: (c[0] < steps) & ~c[1]["done"].all(), body, (jnp.int32(0), state)
    )
    return state
