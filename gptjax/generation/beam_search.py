"""Beam search on the device, with the finished hypotheses and stopping rules of transformers.

Each request keeps `beams` live sequences and its `beams` best finished ones, whose score is the sum
of log-probabilities over (new tokens) ** length_penalty. Candidates are the best 2 * beams
continuations (more with several end tokens), so that `beams` of them go on whatever ends.

In: an `InferenceModel` and a `Request`. Out: the best completions of each prompt.
Dims: R requests, K beams, M candidates of a request, S slots, V vocabulary; rows of request r are
r * K, ..., r * K + K - 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import loop, sampling, scoring
from gptjax.generation.loop import DecodeState, InferenceModel, PromptBatch
from gptjax.generation.options import GenerationOptions
from gptjax.generation.requests import Completion, Request
from gptjax.generation.sampling import Settings
from gptjax.model import head
from gptjax.model.kv_cache import take_rows
from gptjax.ops import collectives
from gptjax.runtime import executables

_OUT = -1e9  # added to the score of what may not be chosen
_STEPS = 32  # between looks at the device: a signal is heard there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The search of a batch, on the device."""

    live: DecodeState  # R * K rows; all beams of a request have the same length
    live_scores: Array  # float32 [R, K]: sums of log-probabilities, best first
    best_tokens: Array  # int32 [R, K, S]: the best finished hypotheses
    best_length: Array  # int32 [R, K]
    best_scores: Array  # float32 [R, K]
    finished: Array  # bool [R, K]: whether there is a hypothesis at all
    over: Array  # bool [R]: nothing can change any more


class Candidates(NamedTuple):
    """The best continuations of a request's live beams, best first."""

    scores: Array  # float32 [R, M]: sums of log-probabilities
    parent: Array  # int32 [R, M]: the beam that each continues
    tokens: Array  # int32 [R, M, S]
    ends: Array  # bool [R, M]: by an end token, or because the text is as long as it may be


class Hypothesis(NamedTuple):
    """A finished text."""

    prompt: int  # its number
    tokens: list[int]  # prompt included
    score: float


def complete(
    model: InferenceModel, request: Request, options: GenerationOptions
) -> list[Completion]:
    """The `request.n` best completions of each prompt, best first. Raises UserError."""
    _check(request, options)
    hypotheses = search(model, request, options)
    rows = scoring.score_rows(model, [hypothesis.tokens for hypothesis in hypotheses])
    completions = []
    for hypothesis, sequence, row in zip(hypotheses, request.sequences, rows, strict=True):
        start = len(request.prompts[hypothesis.prompt])
        new_tokens, logprobs = hypothesis.tokens[start:], row.logprobs[start - 1 :]
        for token, logprob in zip(new_tokens, logprobs, strict=True):
            sequence.feed(token, float(logprob))
        sequence.finish("length")
        completions.append(dataclasses.replace(sequence.completion(), score=hypothesis.score))
    return completions


def search(model: InferenceModel, request: Request, options: GenerationOptions) -> list[Hypothesis]:
    """The `request.n` best texts of each prompt, best first."""
    beams, count = options.num_beams, len(request.prompts)
    context = model.config.context
    extra = model.rows(count) - count  # devices divide requests, whose beams stay together
    limits = [request.limit(len(prompt), 0, context) for prompt in request.prompts]
    limits += [1] * extra
    batch = PromptBatch(
        [*request.prompts, *[[0]] * extra],
        limits=limits,
        seeds=[0] * len(limits),
        slots=model.slots(max(limits)),
        copies=beams,
    )
    settings = sampling.stack_settings(
        [*request.samplings, *request.samplings[-1:] * extra],
        model.config.vocab_size,
        request.eos_ids,
        beams,
    )
    state = model.put(begin(loop.start(model, batch), beams))
    while not np.asarray(state.over).all():
        state = search_beams(
            model.config,
            model.params,
            state,
            settings,
            np.float32(options.length_penalty),
            active=sampling.active_processors(request.samplings),
            beams=beams,
            early_stopping=options.early_stopping,
            mesh=model.mesh,
        )
    tokens, lengths = np.asarray(state.best_tokens), np.asarray(state.best_length)
    scores = np.asarray(state.best_scores)
    hypotheses = []
    for i in range(len(request.prompts)):
        for k in range(request.n):
            text = tokens[i, k, : lengths[i, k]].tolist()
            hypotheses.append(Hypothesis(i, text, float(scores[i, k])))
    return hypotheses


def _check(request: Request, options: GenerationOptions) -> None:
    beams = options.num_beams
    samples = options.temperature > 0
    if request.n > beams or samples or request.has_stop_text or request.context_shift:
        raise UserError(
            f"num_beams = {beams}: needs temperature 0, n <= num_beams, and neither stop texts "
            "nor sliding"
        )
    if options.early_stopping not in (True, False, "never"):
        raise UserError(
            f"early_stopping = {options.early_stopping!r}: must be True, False or 'never'"
        )


def begin(state: DecodeState, beams: int) -> BeamState:
    """The search before its first step. state: `beams` copies a request."""
    requests = state.tokens.shape[0] // beams
    # the copies are equal at first: one of them counts
    scores = jnp.where(jnp.arange(beams) > 0, _OUT, 0.0)
    return BeamState(
        live=state,
        live_scores=jnp.broadcast_to(scores, (requests, beams)),
        best_tokens=state.tokens.reshape(requests, beams, -1),
        best_length=state.length.reshape(requests, beams),
        best_scores=jnp.full((requests, beams), _OUT),
        finished=jnp.zeros((requests, beams), bool),
        over=_of_requests(state.done, beams),  # only rows that fill up the devices
    )


@functools.partial(
    executables.jit,
    static_argnames=("config", "active", "beams", "early_stopping"),
    donate_argnames=("state",),
    outputs="state",
)
def search_beams(
    config: ModelConfig,
    params: Any,
    state: BeamState,
    settings: Settings,
    length_penalty: Array,
    *,
    active: frozenset[str],
    beams: int,
    early_stopping: bool | str,
) -> BeamState:
    """Up to _STEPS steps, or until every request is over; requests must not sample."""

    def step(carry: tuple[Array, BeamState]) -> tuple[Array, BeamState]:
        i, state = carry
        live = state.live
        x, cache = loop.feed(config, params, live.tokens, live.length, live.cache)
        logp = jax.nn.log_softmax(head.unembed(config, params, x[:, 0]))
        logp = sampling.process(logp, settings, live.history, active)
        candidates = _candidates(state, logp, settings["eos_ids"])
        changed = _finish(state, candidates, length_penalty, early_stopping)
        changed, parent = _go_on(changed, candidates)
        over = _is_over(state, changed, candidates, length_penalty, early_stopping)
        rows = parent + jnp.arange(len(parent))[:, None] * beams
        cache = take_rows(cache, rows.reshape(-1), rows.size)
        return i + 1, _commit(state, changed, cache, over)

    def unfinished(carry: tuple[Array, BeamState]) -> Array:
        return (carry[0] < _STEPS) & collectives.anywhere(~carry[1].over.all(), "data")

    _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
    return state


def _candidates(state: BeamState, logp: Array, eos_ids: Array) -> Candidates:
    """The best continuations of each request. logp: float32 [R * K, V]."""
    requests, beams = state.live_scores.shape
    count = max(2, 1 + eos_ids.shape[0]) * beams
    vocab_size = logp.shape[1]
    totals = logp.reshape(requests, beams, -1) + state.live_scores[:, :, None]
    scores, flat = jax.lax.top_k(totals.reshape(requests, -1), count)
    parent, token = flat // vocab_size, (flat % vocab_size).astype(jnp.int32)
    length, limit = _of_requests(state.live.length, beams), _of_requests(state.live.limit, beams)
    tokens = _take(state.live.tokens.reshape(requests, beams, -1), parent)
    rows, numbers = jnp.arange(requests)[:, None], jnp.arange(count)[None]
    tokens = tokens.at[rows, numbers, length[:, None]].set(token)
    ends = (token[..., None] == eos_ids).any(-1) | (length + 1 >= limit)[:, None]
    return Candidates(scores, parent, tokens, ends)


def _finish(
    state: BeamState, candidates: Candidates, length_penalty: Array, early_stopping: bool | str
) -> BeamState:
    """The best finished hypotheses with those candidates that end, of the first K."""
    requests, beams = state.live_scores.shape
    count = candidates.scores.shape[1]
    length = _of_requests(state.live.length, beams) + 1
    new_tokens = length - _of_requests(state.live.prompt_length, beams)
    divisor = new_tokens.astype(jnp.float32)[:, None] ** length_penalty
    full = state.finished.all(-1, keepdims=True) & (early_stopping is True)
    closed = state.over[:, None] | full
    among_first = (jnp.arange(count) < beams)[None]
    joins = candidates.ends & among_first & ~closed
    scores = candidates.scores / divisor + jnp.where(joins, 0.0, _OUT)
    best_scores, best = jax.lax.top_k(jnp.concatenate([state.best_scores, scores], 1), beams)
    lengths = jnp.broadcast_to(length[:, None], (requests, count))
    return dataclasses.replace(
        state,
        best_tokens=_take(jnp.concatenate([state.best_tokens, candidates.tokens], 1), best),
        best_length=_take(jnp.concatenate([state.best_length, lengths], 1), best),
        best_scores=best_scores,
        finished=_take(jnp.concatenate([state.finished, joins], 1), best),
    )


def _go_on(state: BeamState, candidates: Candidates) -> tuple[BeamState, Array]:
    """The live beams: the best candidates that do not end; and the beams they continue [R, K]."""
    requests, beams = state.live_scores.shape
    scores = candidates.scores + jnp.where(candidates.ends, _OUT, 0.0)
    live_scores, best = jax.lax.top_k(scores, beams)
    tokens = _take(candidates.tokens, best).reshape(requests * beams, -1)
    live = dataclasses.replace(state.live, tokens=tokens)
    return dataclasses.replace(state, live=live, live_scores=live_scores), _take(
        candidates.parent, best
    )


def _is_over(
    before: BeamState,
    after: BeamState,
    candidates: Candidates,
    length_penalty: Array,
    early_stopping: bool | str,
) -> Array:
    """bool [R]: whether no live beam can still beat the worst finished hypothesis."""
    beams = before.live_scores.shape[1]
    prompt = _of_requests(before.live.prompt_length, beams)
    new_tokens = _of_requests(before.live.length, beams) + 1 - prompt
    horizon = new_tokens  # the length at which a live beam's score is judged
    if early_stopping == "never":
        longest = _of_requests(before.live.limit, beams) - prompt
        horizon = jnp.where(length_penalty > 0, longest, new_tokens)
    hope = after.live_scores[:, 0] / horizon.astype(jnp.float32) ** length_penalty
    worst = after.best_scores.min(-1, keepdims=True)
    possible = hope > jnp.where(after.finished, worst, _OUT).min(-1)
    enough = after.finished.all(-1) & (early_stopping is True)
    return before.over | ~possible | candidates.ends.all(-1) | enough


def _commit(before: BeamState, after: BeamState, cache: Any, over: Array) -> BeamState:
    """The state after the step; what is finished stays as it was where the search was over."""
    beams = before.live_scores.shape[1]
    going = ~before.over
    length = _of_requests(before.live.length, beams)
    length = jnp.where(going, length + 1, length).repeat(beams)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return dataclasses.replace(
        after,
        live=dataclasses.replace(after.live, length=length, cache=cache),
        best_tokens=keep(after.best_tokens, before.best_tokens),
        best_length=keep(after.best_length, before.best_length),
        best_scores=keep(after.best_scores, before.best_scores),
        finished=keep(after.finished, before.finished),
        over=over,
    )


def _of_requests(rows: Array, beams: int) -> Array:
    """[R] of [R * K], equal for all beams of a request."""
    return rows.reshape(-1, beams)[:, 0]


def _take(array: Array, index: Array) -> Array:
    """[R, M, ...] picked along axis 1 by index [R, K]."""
    return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - 2)), 1)
