"""The generation engine: the host loop that takes tokens off the device and feeds them to texts.

`run` starts the batch of a `Request`, lets a writer write some tokens (by the compiled loop, or one
by one where they follow a grammar) and hand them to the request's `SequenceState`s, and so on until
all are finished. `compile_ahead` prepares the compiled programs that `run` begins with.

Where a request may go on past the context (context shift), rows that have filled it wait until all
rows are done; then a new batch starts from the latest half of each row's tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.generation import guided, loop, speculative
from gptjax.generation.guided import GuidedWriter
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

    steps: how many steps at a time, the last number again and again. A step is a token of each
    text, with speculation or a grammar a pass, which may give several.
    """
    active = active_processors(request.samplings)
    settings = model.put(_settings(model, request))
    writer: _Writer | GuidedWriter
    if request.guided:
        writer = GuidedWriter(model, request, settings, active)
    else:
        writer = _Writer(model, request, settings, active, speculation)
    writer.start(_start(model, _first_batch(model, request, speculation), speculation))
    for count in itertools.chain(steps, itertools.repeat(steps[-1])):
        writer.write(count)
        yield
        if request.finished:
            return
        if writer.is_full:  # the texts that are not finished have filled the context
            batch = _shifted_batch(model, request, speculation)
            writer.start(_start(model, batch, speculation))


class _Writer:
    """Tokens of a batch by a loop on the device."""

    def __init__(
        self,
        model: InferenceModel,
        request: Request,
        settings: Settings,
        active: frozenset[str],
        speculation: Speculation | None,
    ):
        self._model, self._request, self._settings = model, request, settings
        self._active, self._speculation = active, speculation

    def start(self, state: DecodeState) -> None:
        """Goes on with a batch that starts."""
        self._state = state
        self._known = np.array(state.length)
        self._ended = np.array(state.done)  # rows that the device has ended
        self._done = self._ended | self._finished(len(self._ended))  # and those of finished texts

    @property
    def is_full(self) -> bool:
        """Whether no row may grow in this batch."""
        return bool(self._done.all())

    def write(self, count: int) -> None:
        """`count` more tokens, or passes with speculation, in each text."""
        if (self._done != self._ended).any():
            self._state = dataclasses.replace(self._state, done=self._model.put(self._done))
        self._state = self._advance(count)
        self._collect()

    def _advance(self, count: int) -> DecodeState:
        model, speculation, steps = self._model, self._speculation, np.int32(count)
        arguments = (model.config, model.params, self._state, self._settings, steps)
        options: dict[str, Any] = {"active": self._active, "mesh": model.mesh}
        if speculation is None:
            return loop.advance(*arguments, **options)
        draft = speculation.draft
        return speculative.advance(
            *arguments,
            count=speculation.count,
            draft_config=draft.config if draft else None,
            draft_params=draft.params if draft else None,
            **options,
        )

    def _collect(self) -> None:
        """Feeds the tokens from slot `known` on to the sequences."""
        state, request = self._state, self._request
        # copies of what is read after the next call, to which the state is given away
        lengths, self._ended = np.array(state.length), np.array(state.done)
        tokens, logprobs = np.asarray(state.tokens), np.asarray(state.logprobs)
        for i, sequence in enumerate(request.sequences):
            for slot in range(self._known[i], lengths[i]):
                sequence.feed(int(tokens[i, slot]), float(logprobs[i, slot]))
            if len(sequence.tokens) >= request.max_new_tokens:
                sequence.finish("length")
        self._known, self._done = lengths, self._ended | self._finished(len(lengths))

    def _finished(self, rows: int) -> np.ndarray:
        """bool [B]: rows whose text is finished."""
        finished = np.zeros(rows, bool)
        sequences = self._request.sequences
        finished[: len(sequences)] = [bool(sequence.reason) for sequence in sequences]
        return finished


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
    model: InferenceModel, request: Request, speculation: Speculation | None
) -> PromptBatch:
    """The batch after a context shift: the latest half of each row, which is its own prompt now.

    Finished rows stay in the batch, with one token.
    """
    context = model.config.context
    half = max((context + 1) // 2, 1)
    prompts, limits, generated, seeds = [], [], [], []
    for i, sequence in enumerate(request.sequences):
        text = [*request.prompts[i // request.n], *sequence.tokens]
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
    active = active_processors(request.samplings)
    if request.guided:
        steps = guided.first_calls(model, request, state, settings, active)
    else:
        described: Any = (state, settings)
        if model.mesh is not None:
            described = model.described(described)
        arguments = (config, params, *described, np.int32(0))
        steps = (loop.advance.call(*arguments, active=active, mesh=model.mesh),)
    if model.mesh is not None:
        tokens, lengths = model.described((tokens, lengths))
    prefill = loop.prefill.call(
        config,
        params,
        tokens,
        lengths,
        cache_dtype=model.cache_dtype,
        copies=batch.copies,
        mesh=model.mesh,
    )
    return *steps, prefill
