"""Speculative decoding: several tokens are guessed, and one pass of the model checks them.

The guesses that the model would have made itself are kept, so the text is that of greedy decoding
(Leviathan et al. 2023, at temperature 0) in fewer passes. Guesses come from the text so far (prompt
lookup: what followed the last two tokens before) or from a smaller model with the same vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import loop, sampling
from gptjax.generation.loop import DecodeState, InferenceModel
from gptjax.generation.requests import Request
from gptjax.generation.sampling import Settings
from gptjax.model import head, transformer
from gptjax.ops import categorical, collectives
from gptjax.runtime import executables

# processors that may run with guesses; the others would make most guesses wrong
_PROCESSORS = {"logit_bias", "banned", "min_new"}
_DEFAULT_COUNT = 4  # guesses a pass of a draft model


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How tokens are guessed: `count` a pass, by `draft`, or by prompt lookup where it is None."""

    count: int
    draft: InferenceModel | None = None


def build_speculation(
    model: InferenceModel, request: Request, count: int, draft: InferenceModel | None
) -> Speculation:
    """The speculation of a request. count: 0 = the default of a draft model. Raises UserError."""
    for settings in request.samplings:
        if settings.temperature or settings.active - _PROCESSORS:
            raise UserError(
                "speculation gives greedy text: set temperature = 0 and leave penalties and "
                "no_repeat_ngram off"
            )
    if draft and draft.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the draft model has {draft.config.vocab_size:,} tokens and the model "
            f"{model.config.vocab_size:,}: they must share one vocabulary"
        )
    if draft and draft.mesh != model.mesh:
        raise UserError("the draft model is on other devices: give it the mesh of the model")
    return Speculation(count or _DEFAULT_COUNT, draft)


def begin(state: DecodeState, speculation: Speculation) -> DecodeState:
    """The state with what speculation adds to it: a count of passes, the draft model's cache."""
    state = dataclasses.replace(state, passes=jax.device_put(np.int32(0)))
    draft = speculation.draft
    if draft is None:
        return state
    cache = loop.prefill(
        draft.config,
        draft.params,
        state.tokens,
        state.length,
        cache_dtype=draft.cache_dtype,
        mesh=draft.mesh,
    )
    return dataclasses.replace(state, draft_cache=cache)


def lookup(tokens_BS: Array, length_B: Array, count: int) -> Array:
    """int32 [B, count] guesses: what followed the latest earlier place of the last two tokens.

    The last token again where there is no such place.
    """
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
    following = at + 1 + jnp.arange(count)[None]
    written = (at >= 0) & (following < length_B[:, None])
    in_buffer = jnp.minimum(following, tokens_BS.shape[1] - 1)
    return jnp.where(written, jnp.take_along_axis(tokens_BS, in_buffer, 1), last)


def _draft(config: ModelConfig, params: Any, state: DecodeState, count: int) -> tuple[Array, Any]:
    """[B, count] greedy guesses of the draft model, and its cache.

    The cache then holds every token but the last guess.
    """
    # it may lack the last two tokens: the final guess of the pass before was never fed
    at = jnp.maximum(state.length - 2, 0)
    tail = jnp.take_along_axis(state.tokens, at[:, None] + jnp.arange(2)[None], 1)
    x, cache = transformer.apply(config, params, tail, cache=state.draft_cache, start_B=at)
    x = jnp.take_along_axis(x, (state.length - 1 - at)[:, None, None], 1)
    guesses: list[Array] = []
    for k in range(count):
        logits = head.unembed(config, params, x[:, 0])
        guesses.append(jnp.argmax(logits, -1).astype(jnp.int32))
        if k + 1 < count:
            x, cache = transformer.apply(
                config, params, guesses[-1][:, None], cache=cache, start_B=state.length + k
            )
    return jnp.stack(guesses, 1), cache


def _accept(
    state: DecodeState,
    logits: Array,
    guesses: Array,
    settings: Settings,
    active: frozenset[str],
) -> DecodeState:
    """The state with the tokens that the model chooses: as many as agree with the guesses, and one.

    logits [B, count + 1, V]: after the last token and after each of `guesses` [B, count].
    """
    rows = jnp.arange(guesses.shape[0])[:, None]  # in place of random keys, which greedy needs not
    count = guesses.shape[1]
    agreed = ~state.done  # rows whose guesses were right so far
    for k in range(count + 1):
        processed = sampling.process(logits[:, k], settings, state.history, active)
        token = sampling.choose(processed, settings, rows, active)
        logprob = categorical.logprob(logits[:, k], token)
        paused = dataclasses.replace(state, done=state.done | ~agreed)
        after = loop.append(paused, token, logprob, settings["eos_ids"])
        state = dataclasses.replace(after, done=jnp.where(agreed, after.done, state.done))
        if k < count:
            agreed &= (token == guesses[:, k]) & ~state.done
    return state


@functools.partial(
    executables.jit,
    static_argnames=("config", "active", "count", "draft_config"),
    donate_argnames=("state",),
    outputs="state",
)
def advance(
    config: ModelConfig,
    params: Any,
    state: DecodeState,
    settings: Settings,
    steps: Array,
    *,
    active: frozenset[str],
    count: int = 4,
    draft_config: ModelConfig | None = None,
    draft_params: Any = None,
) -> DecodeState:
    """As `loop.advance`, greedy, with `count` guesses a pass: up to `steps` passes.

    The buffer has `count` slots more than any row's limit.
    """

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, state = carry
        if draft_config is None:
            guesses = lookup(state.tokens, state.length, count)
        else:
            guesses, draft_cache = _draft(draft_config, draft_params, state, count)
            state = dataclasses.replace(state, draft_cache=draft_cache)
        rows = jnp.arange(guesses.shape[0])[:, None]
        slots = state.length[:, None] + jnp.arange(count)[None]
        guessed = state.tokens.at[rows, slots].set(guesses)
        x, cache = loop.feed(config, params, guessed, state.length, state.cache, count + 1)
        state = dataclasses.replace(state, cache=cache)
        state = _accept(state, head.unembed(config, params, x), guesses, settings, active)
        return i + 1, dataclasses.replace(state, passes=state.passes + 1)

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < steps) & collectives.anywhere(~carry[1].done.all(), "data")

    _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
    return state
