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
from typing import Any

import jax
import numpy as np

from gptjax.generation import guided, loop, speculative
from gptjax.generation.guided import GuidedDecoder
from gptjax.generation.loop import DecodeState, InferenceModel, PromptBatch
from gptjax.generation.requests import Request
from gptjax.generation.sampling import (
    Settings,
    active_processors,
    mask_words,
    stack_settings,
)
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
    decoder = GuidedDecoder(model, request, settings, active) if request.guided else None

    def start(batch: PromptBatch) -> DecodeState:
        state = _start(model, batch, speculation)
        return decoder.begin(state) if decoder else state

    state = start(_first_batch(model, request, speculation))
    known, turn = np.asarray(state.length), 0
    while True:
        count, turn = steps[min(turn, len(steps) - 1)], turn + 1
        if decoder:
            state = decoder.extend(state, known)
        else:
            state = _advance(model, state, settings, count, active, speculation)
        known, ended, done = _collect(state, known, request)
        yield
        if request.finished:
            return
        if done.all():  # the rest have filled the context
            state = start(_shifted_batch(model, request, state, speculation))
            known, ended = np.asarray(state.length), np.asarray(state.done)
            done = ended.copy()
            for i, sequence in enumerate(request.sequences):
                done[i] = bool(sequence.reason)
        if (done != ended).any():
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


def _collect(
    state: DecodeState, known: np.ndarray, request: Request
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feeds the tokens from slot `known` on to the sequences.

    Returns of each row [B] its length, whether the device has ended it, and whether it is done.
    """
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.length)
    logprobs, ended = np.asarray(state.logprobs), np.asarray(state.done)
    done = ended.copy()
    for i, sequence in enumerate(request.sequences):
        for slot in range(known[i], lengths[i]):
            sequence.feed(int(tokens[i, slot]), float(logprobs[i, slot]))
        if len(sequence.tokens) >= request.max_new_tokens:
            sequence.finish("length")
        done[i] |= bool(sequence.reason)
    return lengths, ended, done


def _first_batch(
    model: InferenceModel, request: Request, speculation: Speculation | None
) -> PromptBatch:
    context = model.config.context
    limits = [request.limit(len(prompt), 0, context) for prompt in request.prompts]
    batch = PromptBatch(
        request.prompts,
        limits=limits,
        seeds=[settings.seed for settings in request.samplings],
        slots=_slots(model, request, limits, speculation),
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
        slots=_slots(model, request, limits, speculation),
        generated=generated,
        copy_numbers=[i % request.n for i in range(len(prompts))],
    )
    return batch.rows_apart(model.rows(batch.rows))


def _slots(
    model: InferenceModel,
    request: Request,
    limits: Sequence[int],
    speculation: Speculation | None,
) -> int:
    """Slots of the buffer: for the longest row, and for guesses or forced tokens behind its end."""
    extra = speculation.count + 1 if speculation else guided.FORCED[-1] if request.guided else 0
    return model.slots(max(limits), extra=extra)


def compile_ahead(
    model: InferenceModel, request: Request, *, folder: str | Path | None = None
) -> None:
    """Prepares the programs that `run` begins with; see `executables.prepare`.

    The parameters of `model` may be shapes.
    """
    executables.prepare([*first_calls(model, request)], folder)


def first_calls(model: InferenceModel, request: Request) -> tuple[Call, ...]:
    """The calls of `loop.advance` and `loop.prefill` that `run` begins with, not yet run; where
    texts are guided, of what stands in the place of `loop.advance`.

    Parameters and devices of `model` may be described (`jax.ShapeDtypeStruct`).
    """
    config, params = model.config, model.params
    batch = _first_batch(model, request, None)
    tokens, lengths = batch.padded()
    state, settings = batch.host_state(), _settings(model, request)
    cache = jax.eval_shape(
        lambda: init_cache(config, len(state.length), batch.slots, dtype=model.cache_dtype)
    )
    state = dataclasses.replace(state, cache=cache)
    width, rows, arrays = 0, len(state.length), tuple[Any, ...]()
    if request.guided:
        settings["allowed"] = np.zeros((rows, mask_words(config.vocab_size)), np.uint32)
        rooms = np.asarray(state.limit) - np.asarray(state.length)
        width = guided.pass_width(guided.forced_counts(request, rooms), config)
        logits = jax.ShapeDtypeStruct((rows, config.vocab_size), np.float32)
        arrays = (*guided.given_arrays(rows, width), logits)
    if model.mesh is not None:
        state, settings, tokens, lengths = map(model.described, (state, settings, tokens, lengths))
        arrays = model.described(arrays)
    options: dict[str, Any] = {
        "active": active_processors(request.samplings),
        "mesh": model.mesh,
    }
    prefill = loop.prefill.call(
        config,
        params,
        tokens,
        lengths,
        cache_dtype=model.cache_dtype,
        copies=batch.copies,
        mesh=model.mesh,
    )
    if not request.guided:
        steps = np.int32(0)
        return loop.advance.call(config, params, state, settings, steps, **options), prefill
    *given, logits = arrays
    texts = (state.tokens, state.length, state.cache)
    forward = loop.forward.call(config, params, *texts, mesh=model.mesh)
    without = dataclasses.replace(state, cache=None)
    choose = loop.choose.call(without, settings, logits, **options)
    if not width:
        return forward, choose, prefill
    extend = loop.extend.call(config, params, state, settings, *given, **options)
    return extend, forward, choose, prefill
