"""How the next token is chosen: the settings of one request, and the processors of its logits.

In: logits [B, V] and what each request asks for. Out: the next token of each row. Order and
formulas are those of transformers' `generate`, so that tokens can be compared; frequency and
presence penalties are OpenAI's.

A batch holds one row of every setting per sequence (`stack_settings`), so requests with different
settings run together. Which processors run at all (`active_processors`) is known when the program
is compiled, so that greedy decoding pays for none.

To add a processor: a field of `Sampling` (with its key in `SamplingKeywords`), a function, and a
row in `PROCESSORS`; if it only shapes what is drawn from, a function in `warpers.py` and a row in
`WARPERS`. A number becomes a flag of `gptjax.generate` and an array of the batch by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, cast

import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Array
from gptjax.generation import warpers
from gptjax.ops.categorical import draw
from gptjax.ops.materialize import kept, unchanged


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that an option accepts, both ends included, and how an error message says it.

    Floats as ends accept integers too; integers as ends accept integers only.
    """

    low: float
    high: float
    words: str

    def check(self, name: str, value: Any) -> None:
        """Raises UserError where the value is outside, or no number."""
        kinds: Any = int | np.integer
        if isinstance(self.low, float):
            kinds = int | float | np.number
        right_kind = isinstance(value, kinds) and not isinstance(value, bool)
        if not right_kind or not self.low <= value <= self.high:
            whole = "" if isinstance(self.low, float) else "a whole number, "
            raise UserError(f"{name} = {value!r}: must be {whole}{self.words}")


_POSITIVE_INT = 2**31 - 1


def option(default: Any, meaning: str, limits: Range | None = None) -> Any:
    """A field of `Sampling` or `GenerationOptions`: default, meaning (also in --help), range."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "range": limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What one request asks of the choice of its tokens. The defaults change nothing: greedy text.

    Raises UserError for a value out of its range.
    """

    temperature: float = option(
        0.0, "0 = most likely token", Range(0.0, 1e6, "0 (most likely token) or more")
    )
    top_k: int = option(
        0, "keep the k most likely tokens; 0 = all", Range(0, _POSITIVE_INT, "0 (off) or more")
    )
    top_p: float = option(
        1.0,
        "keep the most likely tokens up to this probability; 1 = all",
        Range(1e-9, 1.0, "above 0 and at most 1 (off)"),
    )
    min_p: float = option(
        0.0,
        "drop tokens below this share of the best one's probability; 0 = none",
        Range(0.0, 1.0, "from 0 (off) to 1"),
    )
    typical_p: float = option(
        1.0,
        "locally typical sampling up to this probability; 1 = off",
        Range(1e-9, 1.0, "above 0 and at most 1 (off)"),
    )
    repetition_penalty: float = option(
        1.0,
        "divides the logits of tokens that occurred; 1 = off",
        Range(1e-6, 1e6, "above 0; 1 = off"),
    )
    presence_penalty: float = option(
        0.0, "taken from tokens generated before; 0 = off", Range(-1e6, 1e6, "a number; 0 = off")
    )
    frequency_penalty: float = option(
        0.0, "taken once for each time; 0 = off", Range(-1e6, 1e6, "a number; 0 = off")
    )
    no_repeat_ngram: int = option(
        0, "no n tokens in a row twice; 0 = off", Range(0, 64, "from 0 (off) to 64")
    )
    min_new_tokens: int = option(
        0, "no end of text before; 0 = off", Range(0, _POSITIVE_INT, "0 or more")
    )
    seed: int = option(0, "same seed, same text", Range(0, 2**32 - 1, "from 0 to 4294967295"))
    logit_bias: Mapping[int, float] = dataclasses.field(
        default_factory=dict, metadata={"meaning": "added to the logits of these token ids"}
    )
    banned: Sequence[str | int | Sequence[int]] = option(
        (), "words, or lists of token ids, that must not occur"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if limits := field.metadata.get("range"):
                limits.check(field.name, getattr(self, field.name))
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @property
    def guided(self) -> bool:
        """Whether a grammar says which tokens may come (`constraints.py`)."""
        return False

    @property
    def active(self) -> frozenset[str]:
        """Names of the processors that do something, and "sample" where a token is drawn."""
        names = {p.variant(name, self) for name, p in PROCESSORS.items() if p.used(self)}
        if self.temperature > 0:
            names.add("sample")
            names |= {name for name, warper in WARPERS.items() if warper.used(self)}
        return frozenset(names)


def _read_bias(bias: Mapping[Any, float]) -> dict[int, float]:
    """{id: number to add}; ids may be texts, as the keys of JSON are. Raises UserError."""
    numbers = {}
    for token, value in bias.items():
        is_id = str(token).isdecimal() or isinstance(token, int | np.integer)
        if not is_id or not isinstance(value, int | float | np.number) or value != value:
            raise UserError(
                f"logit_bias = {{{token!r}: {value!r}}}: must be numbers by token id, "
                "such as {9: -5.0}"
            )
        numbers[int(token)] = float(value)
    return numbers


class SamplingKeywords(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, for type checkers and editors."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram: int
    min_new_tokens: int
    seed: int
    logit_bias: Mapping[int, float]
    banned: Sequence[str | int | Sequence[int]]


NUMBERS: dict[str, Any] = {  # every setting that is a number: its default
    field.name: field.default
    for field in dataclasses.fields(Sampling)
    if field.metadata.get("range")
}


class History(NamedTuple):
    """What processors may look at: the tokens so far. Slots from `length` on hold leftovers."""

    tokens: Array  # int32 [B, S]
    length: Array  # int32 [B]
    prompt_length: Array  # int32 [B]


Settings = warpers.Settings


@dataclasses.dataclass(frozen=True)
class Processor:
    """A row of `PROCESSORS`."""

    apply: Callable[..., Array]  # (logits [B, V], settings, history) -> logits [B, V]
    used: Callable[[Sampling], bool]  # whether a request needs it
    size: str = ""  # a field that shapes the program: `apply` gets its value as a fourth argument

    def variant(self, name: str, request: Sampling) -> str:
        """The name in the set of active processors: "banned", or with a size "ngram:3"."""
        return f"{name}:{getattr(request, self.size)}" if self.size else name


class Warper(NamedTuple):
    """A row of `WARPERS`."""

    apply: Callable[[Array, Settings, warpers.Add], Array]  # logits [B, V] -> logits [B, V]
    used: Callable[[Sampling], bool]


def active_processors(requests: Sequence[Sampling]) -> frozenset[str]:
    """Names of the processors that some request of a batch needs."""
    return frozenset().union(*(request.active for request in requests))


def stack_settings(
    requests: Sequence[Sampling], vocab_size: int, eos_ids: Sequence[int], copies: int = 1
) -> dict[str, np.ndarray]:
    """The settings of a batch as host arrays, with `copies` rows per request, side by side.

    "eos_ids" [E] is the same for all rows; "logit_bias" [B, V] and "banned" [B, words, n] are there
    only where some request has them. Raises UserError for token ids outside the vocabulary.
    """
    for request in requests:
        _check_ids(request, vocab_size)
    arrays = {}
    for name, default in NUMBERS.items():
        if name != "seed":  # the rows' random keys are made of it
            dtype = np.int32 if isinstance(default, int) else np.float32
            arrays[name] = np.array([getattr(r, name) for r in requests], dtype)
    active = active_processors(requests)
    if "logit_bias" in active:
        arrays["logit_bias"] = np.zeros((len(requests), vocab_size), np.float32)
        for row, request in zip(arrays["logit_bias"], requests, strict=True):
            for token, bias in request.logit_bias.items():
                row[token] += bias
    if "banned" in active:
        arrays["banned"] = _stack_banned(requests, eos_ids)
    rows = {name: array.repeat(copies, 0) for name, array in arrays.items()}
    return {**rows, "eos_ids": np.array(sorted(eos_ids), np.int32)}


def _check_ids(request: Sampling, vocab_size: int) -> None:
    ids: list[Any] = [*request.logit_bias]
    for sequence in _banned_sequences(request):
        ids += sequence
    for token in ids:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise UserError(
                f"token {token!r} is outside the vocabulary of {vocab_size:,}: "
                "check logit_bias and banned"
            )


def _banned_sequences(request: Sampling) -> list[list[int]]:
    """The banned sequences of ids; words were encoded before (`requests.encode_banned`)."""
    sequences = cast(Sequence[Sequence[int]], request.banned)
    return [list(sequence) for sequence in sequences if len(sequence)]


_ANY_TOKEN = -1  # in the table of banned sequences: matches whatever was written
_NO_TOKEN = -2  # matches nothing: fills rows without a sequence
_BEFORE_TEXT = -3  # stands for the slots before the first token; equals neither of the two


def _stack_banned(requests: Sequence[Sampling], eos_ids: Sequence[int]) -> np.ndarray:
    """int32 [requests, sequences, n]: the banned sequences, each at the right end of its row.

    A shorter one has `_ANY_TOKEN` before it. Both sizes are rounded up to powers of two, so that
    many lists share a compiled program. An end token alone is not banned: no text would end.
    """
    by_request = []
    for request in requests:
        sequences = _banned_sequences(request)
        by_request.append([s for s in sequences if s not in [[token] for token in eos_ids]])
    most = max(len(sequences) for sequences in by_request)
    longest = max((len(s) for sequences in by_request for s in sequences), default=1)
    shape = (len(requests), power_of_two(most), power_of_two(longest))
    table = np.full(shape, _NO_TOKEN, np.int32)
    for i, sequences in enumerate(by_request):
        for j, sequence in enumerate(sequences):
            start = shape[2] - len(sequence)
            table[i, j, :start] = _ANY_TOKEN
            table[i, j, start:] = sequence
    return table


def join_banned(tables: Sequence[np.ndarray | None]) -> np.ndarray:
    """Tables of one request each (None: it bans nothing), made one of the largest size."""
    sizes = [table.shape[1:] for table in tables if table is not None]
    shape = (len(tables), max(s[0] for s in sizes), max(s[1] for s in sizes))
    joined = np.full(shape, _NO_TOKEN, np.int32)
    for row, table in zip(joined, tables, strict=True):
        if table is not None:
            count, n = table.shape[1:]
            row[:count] = _ANY_TOKEN
            row[:count, shape[2] - n :] = table[0]
    return joined


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (max(1, number) - 1).bit_length()


def _count_tokens(history: History, vocab_size: int, *, generated: bool) -> Array:
    """How often each token occurs, float32 [B, V]: in the generated part only, or everywhere."""
    slots = jnp.arange(history.tokens.shape[1])[None]
    counted = slots < history.length[:, None]
    if generated:
        counted &= slots >= history.prompt_length[:, None]
    rows = jnp.arange(counted.shape[0])[:, None]
    zeros = jnp.zeros((counted.shape[0], vocab_size))
    return zeros.at[rows, history.tokens].add(counted.astype(jnp.float32), mode="drop")


def logit_bias(logits: Array, settings: Settings, history: History) -> Array:
    """Adds each request's bias."""
    return logits + settings["logit_bias"]


def repetition(logits: Array, settings: Settings, history: History) -> Array:
    """Makes tokens that occurred, in the prompt too, less likely (Keskar et al. 2019).

    Their logits are divided by the penalty where positive and multiplied by it where negative.
    """
    penalty = settings["repetition_penalty"][:, None]
    occurred = _count_tokens(history, logits.shape[1], generated=False) > 0
    return jnp.where(occurred, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def frequency(logits: Array, settings: Settings, history: History) -> Array:
    """Takes frequency_penalty * count, and presence_penalty once, from generated tokens.

    The formula of OpenAI's API reference.
    """
    counts = _count_tokens(history, logits.shape[1], generated=True)
    return (
        logits
        - counts * settings["frequency_penalty"][:, None]
        - (counts > 0) * settings["presence_penalty"][:, None]
    )


def no_repeat_ngram(logits: Array, settings: Settings, history: History, n: int) -> Array:
    """Bans each token that would complete an n-gram which occurred before.

    It acts on the requests that ask for this n.
    """
    tokens, length = history.tokens, history.length
    batch, size = tokens.shape
    slots = jnp.arange(size)[None]
    match = slots + n <= length[:, None]  # a complete n-gram starts here
    for k in range(n - 1):
        tail = jnp.take_along_axis(tokens, jnp.maximum(length - (n - 1) + k, 0)[:, None], 1)
        match &= jnp.roll(tokens, -k, 1) == tail
    match &= ((settings["no_repeat_ngram"] == n) & (length >= n - 1))[:, None]
    completing = jnp.where(match, jnp.roll(tokens, -(n - 1), 1), logits.shape[1])
    return logits.at[jnp.arange(batch)[:, None], completing].set(-jnp.inf, mode="drop")


def banned(logits: Array, settings: Settings, history: History) -> Array:
    """Bans the last token of each sequence whose other tokens have just been written."""
    sequences, tokens, length = settings["banned"], history.tokens, history.length
    n = sequences.shape[2]
    at = length[:, None] - (n - 1) + jnp.arange(n - 1)[None]
    written = jnp.take_along_axis(tokens, jnp.maximum(at, 0), 1)
    tail = jnp.where(at >= 0, written, _BEFORE_TEXT)[:, None]
    start, last = sequences[:, :, :-1], sequences[:, :, -1]
    hit = ((start == tail) | (start == _ANY_TOKEN)).all(-1)
    token = jnp.where(hit & (last >= 0), last, logits.shape[1])
    return logits.at[jnp.arange(tokens.shape[0])[:, None], token].set(-jnp.inf, mode="drop")


def min_new(logits: Array, settings: Settings, history: History) -> Array:
    """Bans the end tokens until the request has its least number of new tokens."""
    ends, rows = jnp.atleast_2d(settings["eos_ids"]), jnp.arange(logits.shape[0])[:, None]
    early = history.length - history.prompt_length < settings["min_new_tokens"]
    out = jnp.where(early[:, None] & (ends >= 0), ends, logits.shape[1])
    return logits.at[rows, out].set(-jnp.inf, mode="drop")


def mask_words(vocab_size: int) -> int:
    """Numbers of 32 bits that have one for each token."""
    return -(-vocab_size // 32)


def guide(logits: Array, settings: Settings, history: History) -> Array:
    """Bans what a grammar does not allow: tokens whose bit in uint32 [B, ceil(V / 32)] is 0."""
    bits = settings["allowed"][:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] > 0
    return jnp.where(allowed, logits, -jnp.inf)


# In transformers' order. All rows pass through the processors; the warpers come after temperature,
# and count only for requests that sample.
PROCESSORS: dict[str, Processor] = {
    "logit_bias": Processor(logit_bias, lambda s: bool(s.logit_bias)),
    "repetition": Processor(repetition, lambda s: s.repetition_penalty != 1),
    "frequency": Processor(
        frequency, lambda s: s.frequency_penalty != 0 or s.presence_penalty != 0
    ),
    "ngram": Processor(no_repeat_ngram, lambda s: s.no_repeat_ngram > 0, size="no_repeat_ngram"),
    "banned": Processor(banned, lambda s: bool(_banned_sequences(s))),
    "min_new": Processor(min_new, lambda s: s.min_new_tokens > 0),
    "guide": Processor(guide, lambda s: s.guided),
}


WARPERS: dict[str, Warper] = {
    "top_k": Warper(warpers.top_k, lambda s: s.top_k > 0),
    "top_p": Warper(warpers.top_p, lambda s: s.top_p < 1),
    "min_p": Warper(warpers.min_p, lambda s: s.min_p > 0),
    "typical": Warper(warpers.typical, lambda s: s.typical_p < 1),
}


def process(
    logits_BV: Array,
    settings: Settings,
    history: History,
    active: frozenset[str],
    *,
    in_order: bool = False,
) -> Array:
    """Logits [B, V] after all active processors, -inf for tokens that are out.

    in_order: for slots, the same bits whatever other processors there are and however many rows:
    else the compiler makes one sum of several processors.

    Where every token is out, the logits come back as they were: a distribution over nothing has no
    sample. What a grammar bans stays out even then.
    """
    barrier, add = (kept, warpers.add_in_order) if in_order else (unchanged, warpers.add)
    original = guide(logits_BV, settings, history) if "guide" in active else logits_BV
    for name, processor in PROCESSORS.items():
        for variant in sorted(active):
            kind, _, size = variant.partition(":")
            if kind == name and size:
                logits_BV = processor.apply(logits_BV, settings, history, int(size))
            elif kind == name:
                logits_BV = processor.apply(logits_BV, settings, history)
            logits_BV = barrier(logits_BV)
    if "sample" in active:
        temperature = settings["temperature"][:, None]
        sampled = temperature > 0
        warped = barrier(logits_BV / jnp.where(sampled, temperature, 1.0))
        for name, warper in WARPERS.items():
            if name in active:
                warped = barrier(warper.apply(warped, settings, add))
        logits_BV = jnp.where(sampled, warped, logits_BV)
    return jnp.where((logits_BV == -jnp.inf).all(-1, keepdims=True), original, logits_BV)


def choose(
    logits_BV: Array,
    settings: Settings,
    keys_B: Array,
    active: frozenset[str],
    in_order: bool = False,
) -> Array:
    """int32 [B]: a draw (`ops.categorical`) where the request samples, else the largest logit."""
    best = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if "sample" not in active:
        return best
    drawn = draw(logits_BV, keys_B, in_order=in_order)
    return jnp.where(settings["temperature"] > 0, drawn, best)
