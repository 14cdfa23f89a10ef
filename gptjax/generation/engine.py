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

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import loop, speculative
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
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables
from gptjax.runtime.executables import Call

FORCED = (0, 4, 16)  # widths of a pass: how many tokens that a grammar forces it writes at most


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
    logits, known, turn = None, np.asarray(state.length), 0
    while True:
        count, turn = steps[min(turn, len(steps) - 1)], turn + 1
        if request.guided:
            state, logits = _extend(model, state, logits, settings, known, request, active)
        else:
            state = _advance(model, state, settings, count, active, speculation)
        done = _collect(state, known, request)
        known = np.asarray(state.length)
        yield
        if request.finished:
            return
        if done.all():  # the rest have filled the context
            state = _start(model, _shifted_batch(model, request, state, speculation), speculation)
            logits = None
            known, done = np.asarray(state.length), np.asarray(state.done).copy()
            for i, sequence in enumerate(request.sequences):
                done[i] = bool(sequence.reason)
        if (done != np.asarray(state.done)).any():
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


def _extend(
    model: InferenceModel,
    state: DecodeState,
    logits: Array | None,
    settings: Settings,
    known: np.ndarray,
    request: Request,
    active: frozenset[str],
) -> tuple[DecodeState, Array | None]:
    """One more token in each row, that its grammar allows, and before it those that the grammar
    forces, where writing them in one pass pays.

    logits: of the token after each row's last one, where they are being computed. So are those that
    come back: the pass for the next token begins before the host has seen this one, and what the
    host does with it takes no time of the device's.
    """
    config, params = model.config, model.params
    rows, rooms = len(known), np.asarray(state.limit) - known
    width = _width(_forced_counts(request, rooms), config)
    given, counts, chooses = _given(rows, width)
    allowed = np.zeros((rows, mask_words(config.vocab_size)), np.uint32)
    for i, sequence in enumerate(request.sequences):
        tokens = sequence.take_given(min(rooms[i], width))
        given[i, : len(tokens)], counts[i] = tokens, len(tokens)
        if sequence.guide and not sequence.reason and not sequence.guide.ended:
            chooses[i] = True
            sequence.guide.write_mask(allowed[i])
    arrays: Any = (allowed, given, counts, chooses)
    if model.mesh is not None:  # one device is quicker to take them with the call
        arrays = model.put(arrays)
    settings = {**settings, "allowed": arrays[0]}
    options: dict[str, Any] = {"active": active, "mesh": model.mesh}
    if width:
        state = loop.extend(config, params, state, settings, *arrays[1:], **options)
    else:
        if logits is None:
            state, logits = _forward(model, state)
        cache, without = state.cache, dataclasses.replace(state, cache=None)
        without = loop.choose(without, settings, logits, arrays[-1], **options)
        state = dataclasses.replace(without, cache=cache)
    if (rooms <= width + 1).all():
        return state, None  # it may be the last one
    return _forward(model, state)


def _forward(model: InferenceModel, state: DecodeState) -> tuple[DecodeState, Array]:
    """The state, and the logits after each row's last token."""
    logits, cache = loop.forward(
        model.config, model.params, state.tokens, state.length, state.cache, mesh=model.mesh
    )
    return dataclasses.replace(state, cache=cache), logits


def _forced_counts(request: Request, rooms: np.ndarray) -> list[int]:
    """How many tokens each text's grammar leaves no choice about, of those that it has room for."""
    counts = []
    for sequence, room in zip(request.sequences, rooms, strict=False):
        forced = sequence.guide.forced() if sequence.guide and not sequence.reason else []
        counts.append(min(len(forced), max(int(room), 0)))
    return counts


def _width(counts: Sequence[int], config: ModelConfig) -> int:
    """The width of the pass that saves most time, with so many forced tokens in each row.

    A row saves a step for each token that it is given. A pass costs as much more as it feeds
    tokens, and a step more: the one that has begun is for nothing.
    """
    rows, together = len(counts), IMPLEMENTATIONS[config.implementation].tokens_of_a_pass

    def gain(width: int) -> float:
        saved = sum(min(count, width) for count in counts) / rows
        times = -(-rows * (width + 1) // together) / -(-rows // together)
        return saved - times if width else 0.0

    return max(FORCED, key=gain)


def _given(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `loop.extend` for rows that are done."""
    given = np.zeros((rows, width), np.int32)
    return given, np.zeros(rows, np.int32), np.zeros(rows, bool)


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
    extra = speculation.count + 1 if speculation else FORCED[-1] if request.guided else 0
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
        width = _width(_forced_counts(request, rooms), config)
        logits = jax.ShapeDtypeStruct((rows, config.vocab_size), np.float32)
        arrays = (*_given(rows, width), logits)
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
    choose = loop.choose.call(without, settings, logits, given[-1], **options)
    if not width:
        return forward, choose, prefill
    extend = loop.extend.call(config, params, state, settings, *given, **options)
    return extend, forward, choose, prefill
