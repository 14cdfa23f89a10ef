"""Guided decoding: a token at a time, of each text one that its grammar allows.

A step is two calls: `loop.choose` takes the next tokens, and `loop.forward` begins with the token
after them before the host has seen them, so that the host looks at the grammars meanwhile. Where a
grammar leaves no choice about several tokens, `loop.extend` writes them in one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import loop
from gptjax.generation.loop import DecodeState, InferenceModel
from gptjax.generation.requests import Request
from gptjax.generation.sampling import Settings, mask_words
from gptjax.ops.implementations import IMPLEMENTATIONS

FORCED = (0, 4, 16)  # widths of a pass: how many tokens that a grammar forces it writes at most


class GuidedDecoder:
    """The steps of a request's batch. It keeps the cache, and the logits that are on their way."""

    def __init__(
        self, model: InferenceModel, request: Request, settings: Settings, active: frozenset[str]
    ):
        self._model, self._request, self._settings = model, request, settings
        self._options: dict[str, Any] = {"active": active, "mesh": model.mesh}
        self._cache: Any = None
        self._logits: Array | None = None  # of the token after each row's last one
        self._limits = np.zeros(0, np.int32)
        # `loop.choose` and `loop.forward`, looked up once a batch: every token would wait for that
        self._choose: Callable[..., DecodeState] | None = None
        self._forward: Callable[..., tuple[Array, Any]] | None = None

    def begin(self, state: DecodeState) -> DecodeState:
        """Takes the cache of a batch that starts; returns the state without it."""
        self._cache, self._logits = state.cache, None
        self._choose = self._forward = None
        self._limits = np.array(state.limit)
        return dataclasses.replace(state, cache=None)

    def extend(self, state: DecodeState, known: np.ndarray) -> DecodeState:
        """One more token in each row, that its grammar allows, and before it those that the grammar
        forces, where writing them in one pass pays.

        known: int32 [B], the rows' lengths.
        """
        model, request = self._model, self._request
        rows, rooms = len(known), self._limits - known
        width = pass_width(forced_counts(request, rooms), model.config)
        given, counts = given_arrays(rows, width)
        allowed = np.zeros((rows, mask_words(model.config.vocab_size)), np.uint32)
        for i, sequence in enumerate(request.sequences):
            tokens = sequence.take_given(min(rooms[i], width))
            given[i, : len(tokens)], counts[i] = tokens, len(tokens)
            if sequence.guide and not sequence.reason and not sequence.guide.ended:
                sequence.guide.write_mask(allowed[i])
        arrays: Any = (allowed, given, counts)
        if model.mesh is not None:  # one device is quicker to take them with the call
            arrays = model.put(arrays)
        settings = {**self._settings, "allowed": arrays[0]}
        if width:
            whole = dataclasses.replace(state, cache=self._cache)
            whole = loop.extend(
                model.config, model.params, whole, settings, *arrays[1:], **self._options
            )
            self._cache, state = whole.cache, dataclasses.replace(whole, cache=None)
        else:
            if self._logits is None:
                self._feed(state)
            texts = (state, settings, self._logits)
            if self._choose is None:
                self._choose = loop.choose.call(*texts, **self._options).program()
            state = self._choose(*texts)
        self._logits = None
        if not (rooms <= width + 1).all():  # it is not the last one
            self._feed(state)
        return state

    def _feed(self, state: DecodeState) -> None:
        """Begins with the logits after each row's last token."""
        model, texts = self._model, (self._model.params, state.tokens, state.length, self._cache)
        if self._forward is None:
            self._forward = loop.forward.call(model.config, *texts, mesh=model.mesh).program()
        self._logits, self._cache = self._forward(*texts)


def forced_counts(request: Request, rooms: np.ndarray) -> list[int]:
    """How many tokens each text's grammar leaves no choice about, of those that it has room for."""
    counts = []
    for sequence, room in zip(request.sequences, rooms, strict=False):
        forced = sequence.guide.forced() if sequence.guide and not sequence.reason else []
        counts.append(min(len(forced), max(int(room), 0)))
    return counts


def pass_width(counts: Sequence[int], config: ModelConfig) -> int:
    """The width of the pass that saves most time, with so many forced tokens in each row.

    A row saves a step for each token that it is given. A pass costs as much more as it feeds
    tokens, and a step more: the one that has begun is for nothing.
    """
    if not any(counts):
        return 0
    rows, together = len(counts), IMPLEMENTATIONS[config.implementation].tokens_of_a_pass

    def gain(width: int) -> float:
        saved = sum(min(count, width) for count in counts) / rows
        times = -(-rows * (width + 1) // together) / -(-rows // together)
        return saved - times if width else 0.0

    return max(FORCED, key=gain)


def given_arrays(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `loop.extend` for rows that are given no tokens."""
    return np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
