"""Guided decoding: a token at a time, of each text one that its grammar allows.

A step is two calls: `choose` takes the next tokens, and `forward` begins with the token after them
before the host has seen them, so that the host looks at the grammars meanwhile. Where a grammar
leaves no choice about several tokens, `extend` writes them in one pass.

The host keeps the texts. At a token that is chosen one array crosses to the device, the masks, and
one back: on a CPU the weights pass through the caches at every token, and nothing that the host
then does is in them, so that a call takes it 100 microseconds instead of 4, an array of numpy in
one 20, and reading one 35 instead of 2.

In: an `InferenceModel`, a `Request`, and batches that start. Out: the request's texts.
Dims: B rows, S slots, K given tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import loop, sampling
from gptjax.generation.constraints import GuideState
from gptjax.generation.loop import DecodeState, InferenceModel
from gptjax.generation.requests import Request
from gptjax.generation.sampling import History, Settings, mask_words
from gptjax.model import head, transformer
from gptjax.ops import categorical
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables, sharding
from gptjax.runtime.devices import platform_of
from gptjax.runtime.executables import Call

_LAST = struct.Struct("=iif")  # a row of `last`
FORCED = (0, 4, 16)  # widths of a pass: how many tokens that a grammar forces it writes at most


@functools.partial(
    executables.jit,
    static_argnames=("config",),
    donate_argnames=("cache",),
    outputs=(sharding.TEXTS, sharding.CACHE),
)
def forward(config: ModelConfig, params: Any, last: Array, cache: Any) -> tuple[Array, Any]:
    """Logits [B, V] of the token after each row's last one, and the cache with that one in it.

    last int32 [B, 3]: of each row its last token, its length, and the bits of the token's
    log-probability. The cache keeps its meaning, because feeding a token again changes nothing.
    """
    x, cache = transformer.apply(config, params, last[:, :1], cache=cache, start_B=last[:, 1] - 1)
    return head.unembed(config, params, x[:, 0]), cache


@functools.partial(executables.jit, static_argnames=("active",), donate_argnames=("tokens",))
def choose(
    tokens: Array, last: Array, settings: Settings, logits: Array, *, active: frozenset[str]
) -> tuple[Array, Array]:
    """`tokens` [B, S] and `last` [B, 3] after one more token in each row that has one in its mask.

    With `forward` before it this is a step of `loop.advance`, with its settings and three more of
    the rows ("seed", "copy" and "prompt_length"), but for limits and ends: "allowed", the masks,
    are empty for rows that may not grow. Log-probabilities are the model's own.
    """
    length, prompt_length = last[:, 1], settings["prompt_length"]
    history = History(tokens, length, prompt_length)
    processed = sampling.process(logits, settings, history, active)
    keys = loop.row_keys(settings["seed"], settings["copy"], length - prompt_length)
    chosen = sampling.choose(processed, settings, keys, active)
    grows = (settings["allowed"] != 0).any(-1)
    after = _last(chosen, length + 1, categorical.logprob(logits, chosen))
    at = jnp.where(grows, length, tokens.shape[1])
    tokens = tokens.at[jnp.arange(len(at)), at].set(chosen, mode="drop")
    return tokens, jnp.where(grows[:, None], after, last)


@functools.partial(
    executables.jit,
    static_argnames=("config", "active"),
    donate_argnames=("tokens", "cache"),
    outputs=(sharding.TEXTS, sharding.TEXTS, sharding.CACHE, sharding.TEXTS),
)
def extend(
    config: ModelConfig,
    params: Any,
    tokens: Array,
    last: Array,
    cache: Any,
    settings: Settings,
    given: Array,
    counts: Array,
    *,
    active: frozenset[str],
) -> tuple[Array, Array, Any, Array]:
    """The same after given tokens and one more that is chosen after them, all in one pass; and the
    log-probabilities [B, K] of the given ones.

    given int32 [B, K]: the first counts[b] of row b are appended to it. The buffer has K slots more
    than any row's limit.
    """
    count, length = given.shape[1], last[:, 1]
    rows, steps = jnp.arange(len(given))[:, None], jnp.arange(count)[None]
    slots = jnp.where(steps < counts[:, None], length[:, None] + steps, tokens.shape[1])
    tokens = tokens.at[rows, slots].set(given, mode="drop")
    x, cache = loop.feed(config, params, tokens, length, cache, count + 1)
    logits = head.unembed(config, params, x)
    logprobs = categorical.logprob(logits[:, :count], given)

    def at(array: Array, place: Array) -> Array:
        return jnp.take_along_axis(array, jnp.maximum(place, 0)[:, None], 1)[:, 0]

    after = _last(at(given, counts - 1), length + counts, at(logprobs, counts - 1))
    last = jnp.where(counts[:, None] > 0, after, last)
    logits = jnp.take_along_axis(logits, counts[:, None, None], 1)[:, 0]
    tokens, last = choose.function(tokens, last, settings, logits, active=active)
    return tokens, last, cache, logprobs


def _last(token: Array, length: Array, logprob: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(logprob, jnp.int32)
    return jnp.stack([token.astype(jnp.int32), length, bits], -1)


class GuidedWriter:
    """The steps of a request's texts. It keeps the cache, and the logits that are on their way."""

    def __init__(
        self, model: InferenceModel, request: Request, settings: Settings, active: frozenset[str]
    ):
        self._model, self._request, self._guides = model, request, request.guides
        self._settings: dict[str, Any] = dict(settings)
        self._options: dict[str, Any] = {"active": active, "mesh": model.mesh}
        self._on_cpu = platform_of(model.mesh) == "cpu"

    def start(self, state: DecodeState) -> None:
        """Goes on with a batch that starts."""
        self._settings |= row_settings(state)
        last = first_last(np.asarray(state.tokens), np.asarray(state.length))
        self._tokens, self._last, self._cache = state.tokens, self._model.put(last), state.cache
        self._lengths, self._limits = last[:, 1].tolist(), np.asarray(state.limit).tolist()
        self._logits: Array | None = None  # of the token after each row's last one
        # looked up once a batch: every token would wait for that
        self._choose_program: Callable[..., Any] | None = None
        self._forward_program: Callable[..., Any] | None = None

    @property
    def is_full(self) -> bool:
        """Whether no row may grow in this batch."""
        return not any(self._rooms())

    def _rooms(self) -> list[int]:
        """How many tokens more each row may get: none if its text or its grammar has ended, or if
        it only fills up the devices."""
        rooms = [limit - length for limit, length in zip(self._limits, self._lengths, strict=True)]
        for i, sequence in enumerate(self._request.sequences):
            if sequence.reason or self._guides[i].ended:
                rooms[i] = 0
        return rooms

    def write(self, count: int) -> None:
        """`count` steps, or one where a stop text may end a text before its grammar does.

        A step is a token more in each text that may grow, and before it those that the grammar
        forces, where writing them in one pass pays. Tokens become text after the last step: at
        each, the code for it would have to come into the processor's caches again.
        """
        sequences = self._request.sequences
        written: list[list[tuple[int, float]]] = [[] for _ in sequences]
        for _ in range(1 if self._request.has_stop_text else count):
            if any(rooms := self._rooms()):
                self._step(rooms, written)
        for sequence, pairs in zip(sequences, written, strict=True):
            for token, logprob in pairs:
                sequence.feed(token, logprob)
            if len(sequence.tokens) >= self._request.max_new_tokens:
                sequence.finish("length")

    def _step(self, rooms: list[int], written: list[list[tuple[int, float]]]) -> None:
        """Adds the tokens of one step, with their log-probabilities, to `written`."""
        config, sequences = self._model.config, self._request.sequences
        width = pass_width(forced_counts(self._guides, rooms), config)
        allowed = np.zeros((len(rooms), mask_words(config.vocab_size)), np.uint32)
        given = []
        for i, sequence in enumerate(sequences):
            given.append(sequence.take_given(min(rooms[i], width)))
            if rooms[i] > len(given[i]) and not self._guides[i].ended:
                self._guides[i].write_mask(allowed[i])
        self._settings["allowed"] = allowed
        if self._model.mesh is not None:  # one device is quicker to take it with the call
            self._settings["allowed"] = self._model.put(allowed)
        logprobs = self._extend(given, width) if width else self._choose()
        self._logits = None
        if any(room > width + 1 for room in rooms):  # it is not the last one
            self._forward()
        last = [*_LAST.iter_unpack(np.ascontiguousarray(self._last))]
        for i, sequence in enumerate(sequences):
            token, length, logprob = last[i]
            written[i] += zip(given[i], logprobs[i], strict=False)
            if length > self._lengths[i] + len(given[i]):
                sequence.guide_on(token)
                written[i].append((token, logprob))
        self._lengths = [length for _, length, _ in last]

    def _choose(self) -> list[list[float]]:
        """Returns the log-probabilities of no given tokens."""
        if self._logits is None:
            self._forward()
        arrays = (self._tokens, self._last, self._settings, self._logits)
        if self._choose_program is None:
            self._choose_program = choose.call(*arrays, **self._options).program()
        self._tokens, self._last = self._choose_program(*arrays)
        if self._on_cpu:
            # Only now is the next `forward` called: the one that makes these logits uses all cores,
            # and what the host does beside it delays it as much. `choose` leaves a core idle.
            jax.block_until_ready(self._logits)
        return [[]] * len(self._lengths)

    def _forward(self) -> None:
        """Begins with the logits after each row's last token."""
        model, arrays = self._model, (self._model.params, self._last, self._cache)
        if self._forward_program is None:
            self._forward_program = forward.call(model.config, *arrays, mesh=model.mesh).program()
        self._logits, self._cache = self._forward_program(*arrays)

    def _extend(self, given: list[list[int]], width: int) -> list[list[float]]:
        """Returns the log-probabilities of the given tokens."""
        model, arrays = self._model, given_arrays(given, len(self._lengths), width)
        if model.mesh is not None:
            arrays = model.put(arrays)
        texts = (self._tokens, self._last, self._cache, self._settings)
        made = extend(model.config, model.params, *texts, *arrays, **self._options)
        self._tokens, self._last, self._cache, logprobs = made
        return np.asarray(logprobs).tolist()


def row_settings(state: DecodeState) -> dict[str, Array]:
    """What the rows of a batch that starts add to its settings."""
    return {name: getattr(state, name) for name in ("seed", "copy", "prompt_length")}


def first_last(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32 [B, 3]: the argument `last` of a batch that starts."""
    ids = tokens[np.arange(len(lengths)), lengths - 1]
    return np.stack([ids, lengths, np.zeros_like(lengths)], -1)


def first_calls(
    model: InferenceModel,
    request: Request,
    state: DecodeState,
    settings: dict[str, Any],
    active: frozenset[str],
) -> tuple[Call, ...]:
    """The calls that a batch begins with, not yet run.

    state: of host arrays, and of a cache that is described.
    """
    config, params, cache = model.config, model.params, state.cache
    options: dict[str, Any] = {"active": active, "mesh": model.mesh}
    host_tokens, lengths, limits = map(np.asarray, (state.tokens, state.length, state.limit))
    rows, rooms = len(lengths), (limits - lengths).tolist()
    width = pass_width(forced_counts(request.guides, rooms), config)
    allowed = np.zeros((rows, mask_words(config.vocab_size)), np.uint32)
    texts: Any = (
        host_tokens,
        first_last(host_tokens, lengths),
        settings | row_settings(state) | {"allowed": allowed},
        jax.ShapeDtypeStruct((rows, config.vocab_size), np.float32),
        given_arrays([], rows, width),
    )
    if model.mesh is not None:
        # a cache is known by its name
        texts, cache = model.described(texts), model.described({"cache": cache})["cache"]
    tokens, last, settings, logits, given = texts
    calls = (
        forward.call(config, params, last, cache, mesh=model.mesh),
        choose.call(tokens, last, settings, logits, **options),
    )
    if not width:
        return calls
    texts = (tokens, last, cache, settings)
    return extend.call(config, params, *texts, *given, **options), *calls


def forced_counts(guides: Sequence[GuideState], rooms: Sequence[int]) -> list[int]:
    """How many tokens each text's grammar leaves no choice about, of those that it has room for."""
    pairs = zip(guides, rooms, strict=False)
    return [min(len(guide.forced()), room) for guide, room in pairs]


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


def given_arrays(
    given: Sequence[Sequence[int]], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The arguments `given` and `counts` of `extend`."""
    tokens, counts = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for i, ids in enumerate(given):
        tokens[i, : len(ids)], counts[i] = ids, len(ids)
    return tokens, counts
