"""TODO docstring."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.generation import loop as decode_loop
from gptjax.generation import speculative
from gptjax.generation.requests import Request
from gptjax.generation.sampling import active_of, arrays
from gptjax.model.kv_cache import init_cache
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Guesses a pass; a draft model's config, weights and type of cache, or None for prompt lookup."""

    count: int
    draft_config: ModelConfig | None = None
    draft_weights: Any = None
    draft_cache_dtype: str = ""


def run(
    config: ModelConfig,
    weights: Any,
    request: Request,
    *,
    steps: Sequence[int],
    cache_dtype: str = "",
    guess: Speculation | None = None,
) -> Iterator[None]:
    """Fills the request's rows; yields whenever tokens came. steps: how many at a time, the last number again and again.

    Where text slides, each time that the context is full its latest half is read again from the start, and goes on.
    """
    active = active_of(request.samplings)
    options = jax.device_put(arrays(request.samplings, config.vocab_size, request.stops, request.n))
    full = config.context + 1  # the last token that a full context predicts is never fed
    state = _begin(
        config,
        weights,
        request,
        request.prompts,
        [0] * len(request.prompts),
        request.n,
        cache_dtype,
        guess,
    )
    known, turn = np.asarray(state["length"]), 0
    while True:
        count, turn = steps[min(turn, len(steps) - 1)], turn + 1
        if guess:
            extra = dict(
                count=guess.count, draft_config=guess.draft_config, draft_params=guess.draft_weights
            )
            state = speculative.advance(
                config, weights, state, options, np.int32(count), active=active, **extra
            )
        else:
            state = decode_loop.advance(
                config, weights, state, options, np.int32(count), active=active
            )
        tokens, lengths, logprobs = (
            np.asarray(state[name]) for name in ("tokens", "length", "logprobs")
        )
        done = np.asarray(state["done"]).copy()
        for i, row in enumerate(request.rows):
            for at in range(known[i], lengths[i]):
                row.feed(int(tokens[i, at]), float(logprobs[i, at]))
            if len(row.tokens) >= request.max_new_tokens:
                row.finish("length")
            done[i] |= bool(row.reason)
        known = lengths
        if all(row.reason for row in request.rows):
            yield
            return
        yield
        if done.all():  # some stand at the end of the context and go on
            rows = [r.tolist()[: lengths[i]] for i, r in enumerate(tokens)]
            prompts = [
                r[-max(full // 2, 1) :] if not row.reason else r[-1:]
                for r, row in zip(rows, request.rows, strict=True)
            ]
            state = _begin(
                config,
                weights,
                request,
                prompts,
                [len(row.tokens) for row in request.rows],
                1,
                cache_dtype,
                guess,
            )
            state["copy"] = jax.device_put(
                np.tile(np.arange(request.n, dtype=np.uint32), len(request.prompts))
            )
            known = np.asarray(state["length"])
            done = np.array([bool(row.reason) for row in request.rows])
        state["done"] = jax.device_put(done)


def compile_ahead(
    config: ModelConfig,
    weights: Any,
    request: Request,
    *,
    cache_dtype: str = "",
    folder: str | Path | None = None,
) -> None:
    """Makes ready the programs that `run` begins with; see `programs.make_ready`. `weights` may be shapes."""
    places = _places(config, request, request.prompts, [0] * len(request.prompts), request.n, None)
    tokens, length, state = decode_loop.host_state(request.prompts, **places)
    state["cache"] = jax.eval_shape(
        lambda: init_cache(config, len(state["length"]), tokens.shape[1], dtype=cache_dtype)
    )
    options = arrays(request.samplings, config.vocab_size, request.stops, request.n)
    step = decode_loop.advance.call(
        config, weights, state, options, np.int32(0), active=active_of(request.samplings)
    )
    executables.prepare(
        [
            step,
            decode_loop.prefill.call(
                config, weights, tokens, length, cache_dtype=cache_dtype, copies=request.n
            ),
        ],
        folder,
    )


def _begin(
    config: ModelConfig,
    weights: Any,
    request: Request,
    prompts: list[list[int]],
    made: list[int],
    copies: int,
    cache_dtype: str,
    guess: Speculation | None,
) -> decode_loop.State:
    state = decode_loop.start(
        config,
        weights,
        prompts,
        cache_dtype=cache_dtype,
        **_places(config, request, prompts, made, copies, guess),
    )
    if guess:
        state["passes"] = jax.device_put(np.int32(0))
        if guess.draft_config:
            cache = decode_loop.prefill(
                guess.draft_config,
                guess.draft_weights,
                state["tokens"],
                state["length"],
                cache_dtype=guess.draft_cache_dtype,
            )
            state["draft_cache"] = cache
    return state


def _places(
    config: ModelConfig,
    request: Request,
    prompts: list[list[int]],
    made: list[int],
    copies: int,
    guess: Speculation | None,
) -> dict[str, Any]:
    """What `decode.host_state` is told of these prompts."""
    limits = [
        min(len(p) + request.max_new_tokens - m, config.context + 1)
        for p, m in zip(prompts, made, strict=True)
    ]
    slots = decode_loop.bucket(
        max(limits) + (guess.count + 1 if guess else 0),
        config.context + (guess.count + 2 if guess else 1),
        IMPLEMENTATIONS[config.implementation].prefill_chunk,
    )
    seeds = [
        s.seed
        for s in request.samplings
        for _ in range(request.n if len(prompts) != len(request.samplings) else 1)
    ]
    return {"limits": limits, "slots": slots, "seeds": seeds, "copies": copies, "made": made}
