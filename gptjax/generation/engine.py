"""The generation engine: the host loop that takes tokens off the device and feeds them to texts.

`run` starts the batch of a `Request`, lets the compiled loop write some tokens, hands them to the
request's `SequenceState`s, and so on until all are finished. `compile_ahead` prepares the compiled
programs that `run` begins with.

Where a request may go on past the context (context shift), rows that have filled it wait until all
rows are done; then a new batch starts from the latest half of each row's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from gptjax.generation import loop, speculative
from gptjax.generation.loop import DecodeState, InferenceModel, PromptBatch
from gptjax.generation.requests import Request
from gptjax.generation.sampling import Settings, active_processors, stack_settings
from gptjax.generation.speculative import Speculation
from gptjax.model.kv_cache import init_cache
from gptjax.runtime import executables
from gptjax.runtime.executables import Call


def run(
    model: InferenceModel,
    request: Request,
    *,
    steps: Sequence[int],
    speculation: Speculation | None = None,
) -> Iterator[None]:
    """Fills the request's sequences; yields whenever tokens came.

    steps: how many tokens (with speculation: passes) at a time, the last number again and again.
    """
    active = active_processors(request.samplings)
    settings = model.put(_settings(model, request))
    state = _start(model, _first_batch(model, request, speculation), speculation)
    known, turn = np.asarray(state.length), 0
    while True:
        count, turn = steps[min(turn, len(steps) - 1)], turn + 1
        state = _advance(model, state, settings, count, active, speculation)
        done = _collect(state, known, request)
        known = np.asarray(state.length)
        yield
        if request.finished:
            return
        if done.all():  # the rest have filled the context
            state = _start(model, _shifted_batch(model, request, state, speculation), speculation)
            known, done = np.asarray(state.length), np.asarray(state.done).copy()
            for i, sequence in enumerate(request.sequences):
                done[i] = bool(sequence.reason)
        state = dataclasses.replace(state, done=model.put(done))


def _settings(model: InferenceModel, request: Request) -> dict[str, np.ndarray]:
    """Of each row, also of those that only fill up the devices."""
    config, count = model.config, len(request.prompts) * request.n
    settings = stack_settings(request.samplings, config.vocab_size, request.eos_ids, request.n)
    if extra := model.rows(count) - count:
        for name, array in settings.items():
            if name != "eos_ids":
                settings[name] = np.concatenate([array, array[-1:].repeat(extra, 0)])
    return settings


def _start(
    model: InferenceModel, batch: PromptBatch, speculation: Speculation | None
) -> DecodeState:
    """The state of a batch after prefill, by the draft model too."""
    state = loop.start(model, batch)
    return speculative.begin(state, speculation) if speculation else state


def _advance(
    model: InferenceModel,
    state: DecodeState,
    settings: Settings,
    count: int,
    active: frozenset[str],
    speculation: Speculation | None,
) -> DecodeState:
    """`count` more tokens, or passes with speculation, in each row."""
    config, params, steps = model.config, model.params, np.int32(count)
    if speculation is None:
        return loop.advance(config, params, state, settings, steps, active=active, mesh=model.mesh)
    draft = speculation.draft
    return speculative.advance(
        config,
        params,
        state,
        settings,
        steps,
        active=active,
        count=speculation.count,
        draft_config=draft.config if draft else None,
        draft_params=draft.params if draft else None,
        mesh=model.mesh,
    )


def _collect(state: DecodeState, known: np.ndarray, request: Request) -> np.ndarray:
    """Feeds the tokens from slot `known` on to the sequences. Returns which rows are done [B]."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.length)
    logprobs, done = np.asarray(state.logprobs), np.asarray(state.done).copy()
    for i, sequence in enumerate(request.sequences):
        for slot in range(known[i], lengths[i]):
            sequence.feed(int(tokens[i, slot]), float(logprobs[i, slot]))
        if len(sequence.tokens) >= request.max_new_tokens:
            sequence.finish("length")
        done[i] |= bool(sequence.reason)
    return done


def _first_batch(
    model: InferenceModel, request: Request, speculation: Speculation | None
) -> PromptBatch:
    context = model.config.context
    limits = [request.limit(len(prompt), 0, context) for prompt in request.prompts]
    batch = PromptBatch(
        request.prompts,
        limits=limits,
        seeds=[settings.seed for settings in request.samplings],
        slots=_slots(model, limits, speculation),
        copies=request.n,
    )
    return batch if model.groups == 1 else batch.rows_apart(model.rows(batch.rows))


def _shifted_batch(
    model: InferenceModel,
    request: Request,
    state: DecodeState,
    speculation: Speculation | None,
) -> PromptBatch:
    """The batch after a context shift: the latest half of each row, which is its own prompt now.

    Finished rows stay in the batch, with one token.
    """
    context = model.config.context
    half = max((context + 1) // 2, 1)
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.length)
    prompts, limits, generated, seeds = [], [], [], []
    for i, sequence in enumerate(request.sequences):
        text = tokens[i, : lengths[i]].tolist()
        prompts.append(text[-1:] if sequence.reason else text[-half:])
        generated.append(len(sequence.tokens))
        limits.append(request.limit(len(prompts[i]), generated[i], context))
        seeds.append(request.samplings[i // request.n].seed)
    batch = PromptBatch(
        prompts,
        limits=limits,
        seeds=seeds,
        slots=_slots(model, limits, speculation),
        generated=generated,
        copy_numbers=[i % request.n for i in range(len(prompts))],
    )
    return batch.rows_apart(model.rows(batch.rows))


def _slots(model: InferenceModel, limits: Sequence[int], speculation: Speculation | None) -> int:
    """Slots of the buffer: for the longest row, and for guesses behind its end."""
    return model.slots(max(limits), extra=speculation.count + 1 if speculation else 0)


def compile_ahead(
    model: InferenceModel, request: Request, *, folder: str | Path | None = None
) -> None:
    """Prepares the programs that `run` begins with; see `executables.prepare`.

    The parameters of `model` may be shapes.
    """
    executables.prepare([*first_calls(model, request)], folder)


def first_calls(model: InferenceModel, request: Request) -> tuple[Call, Call]:
    """The calls of `loop.advance` and `loop.prefill` that `run` begins with, not yet run.

    Parameters and devices of `model` may be described (`jax.ShapeDtypeStruct`).
    """
    config = model.config
    batch = _first_batch(model, request, None)
    tokens, lengths = batch.padded()
    state, settings = batch.host_state(), _settings(model, request)
    cache = jax.eval_shape(
        lambda: init_cache(config, len(state.length), batch.slots, dtype=model.cache_dtype)
    )
    state = dataclasses.replace(state, cache=cache)
    if model.mesh is not None:
        state, settings, tokens, lengths = map(model.described, (state, settings, tokens, lengths))
    advance = loop.advance.call(
        config,
        model.params,
        state,
        settings,
        np.int32(0),
        active=active_processors(request.samplings),
        mesh=model.mesh,
    )
    prefill = loop.prefill.call(
        config,
        model.params,
        tokens,
        lengths,
        cache_dtype=model.cache_dtype,
        copies=batch.copies,
        mesh=model.mesh,
    )
    return advance, prefill
