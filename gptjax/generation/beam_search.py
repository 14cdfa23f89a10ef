"""Beam search on the device, with the finished hypotheses and stopping rules of transformers' `generate`.

Each request keeps `beams` live sequences and the `beams` best finished ones, whose score is the sum of log-probabilities over
(new tokens) ** length_penalty. Candidates are the best 2 * beams continuations (more with several end tokens), so that
`beams` of them go on whatever ends.
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
from gptjax.generation.loop import State, feed
from gptjax.model import head
from gptjax.model.kv_cache import take_rows
from gptjax.runtime import executables

_OUT = -1e9


def begin(state: State, beams: int) -> State:
    """Beam search's additions to a state of `beams` copies a request."""
    b = state["tokens"].shape[0] // beams
    live = jnp.where(
        jnp.arange(beams) > 0, _OUT, 0.0
    )  # the copies are equal at first: one of them counts
    return {
        **state,
        "scores": jnp.broadcast_to(live, (b, beams)),
        "ended": jnp.zeros((b, beams), bool),
        "over": jnp.zeros(b, bool),
        "best_tokens": state["tokens"].reshape(b, beams, -1),
        "best_length": state["length"].reshape(b, beams),
        "best_scores": jnp.full((b, beams), _OUT),
    }


def _take(tree: Any, index: Array) -> Any:
    """[b, n, ...] picked by index [b, k] along axis 1."""
    return jax.tree.map(
        lambda a: jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), 1), tree
    )


@functools.partial(
    executables.jit,
    static_argnames=("config", "active", "beams", "early_stopping"),
    donate_argnames=("state",),
)
def search(
    config: ModelConfig,
    params: Any,
    state: State,
    options: Mapping[str, Array],
    length_penalty: Array,
    *,
    active: frozenset[str],
    beams: int,
    early_stopping: bool | str,
) -> State:
    """Runs until every request has ended. Rows of request r are r * beams, ...; requests must not sample."""
    stops = options["stops"]
    kept = max(2, 1 + stops.shape[0]) * beams
    b = state["scores"].shape[0]
    prompt = state["prompt_length"].reshape(b, beams)[:, 0]
    limit = state["limit"].reshape(b, beams)[:, 0]

    def body(state: State) -> State:
        x, cache = feed(config, params, state)
        logp = jax.nn.log_softmax(head.unembed(config, params, x[:, 0]))
        logp = (
            sampling.process(logp, options, state, active).reshape(b, beams, -1)
            + state["scores"][:, :, None]
        )
        vocab = logp.shape[2]
        scores, flat = jax.lax.top_k(logp.reshape(b, -1), kept)
        parent, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        length = state["length"].reshape(b, beams)[:, 0]
        sequences = _take(state["tokens"].reshape(b, beams, -1), parent)
        sequences = sequences.at[
            jnp.arange(b)[:, None], jnp.arange(kept)[None], length[:, None]
        ].set(token)
        ends = (token[..., None] == stops).any(-1) | (length + 1 >= limit)[:, None]
        # live beams: the best that go on
        live_scores, pick = jax.lax.top_k(scores + jnp.where(ends, _OUT, 0.0), beams)
        # finished ones: those among the first `beams` candidates that end, against what was finished before
        made = (length + 1 - prompt).astype(jnp.float32)[:, None]
        shut = state["over"][:, None] | (
            state["ended"].all(-1, keepdims=True) & (early_stopping is True)
        )
        finished = scores / made**length_penalty + jnp.where(
            shut | ~ends | (jnp.arange(kept) >= beams)[None], _OUT, 0.0
        )
        ok = ends & (jnp.arange(kept) < beams)[None] & ~shut
        pool_scores = jnp.concatenate([state["best_scores"], finished], 1)
        best_scores, best = jax.lax.top_k(pool_scores, beams)
        pool = (
            jnp.concatenate([state["best_tokens"], sequences], 1),
            jnp.concatenate(
                [state["best_length"], jnp.broadcast_to((length + 1)[:, None], (b, kept))], 1
            ),
            jnp.concatenate([state["ended"], ok], 1),
        )
        best_tokens, best_length, ended = _take(pool, best)
        # can a live beam still beat the worst finished one?
        horizon = (limit - prompt) if early_stopping == "never" else (length + 1 - prompt)
        horizon = jnp.where(length_penalty > 0, horizon, length + 1 - prompt).astype(jnp.float32)
        possible = live_scores[:, 0] / horizon**length_penalty > jnp.where(
            ended, best_scores.min(-1, keepdims=True), _OUT
        ).min(-1)
        over = state["over"] | ~possible | ends.all(-1) | (ended.all(-1) & (early_stopping is True))
        going = ~state["over"]
        chosen = _take(parent, pick) + jnp.arange(b)[:, None] * beams
        new = {
            "tokens": _take(sequences, pick).reshape(b * beams, -1),
            "cache": take_rows(cache, chosen.reshape(-1), b * beams),
            "length": jnp.where(going, length + 1, length).repeat(beams),
            "scores": live_scores,
            "over": over,
        }
        old = {
            "best_tokens": best_tokens,
            "best_length": best_length,
            "best_scores": best_scores,
            "ended": ended,
        }
        keep = lambda new, old: jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return {**state, **new, **{name: keep(value, state[name]) for name, value in old.items()}}

    return jax.lax.while_loop(lambda state: ~state["over"].all(), body, state)
