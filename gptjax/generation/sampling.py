"""How the next token is chosen: settings as data, and each processor of logits as a small function.

Order and formulas are those of transformers' `generate`, so that numbers can be compared; frequency and presence penalties are OpenAI's.
Values are arrays with a row per request; which processors run at all (`active`) is known when the program is compiled, so that
greedy decoding pays for none. To add a processor: a field of `Sampling`, a function, a row in `PROCESSORS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Defaults change nothing. temperature 0 takes the most likely token."""

    temperature: float = 0.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0  # tokens below this share of the best one's probability go
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0  # no n tokens in a row occur twice; 0 = off
    min_new_tokens: int = 0  # no end of text before
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    banned: Sequence[Sequence[int]] = ()  # sequences of tokens that must not occur
    seed: int = 0

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, Any, Any, str], ...] = (
            ("temperature", 0.0, 1e6, "0 (most likely token) or more"),
            ("top_k", 0, 2**31 - 1, "0 (off) or more"),
            ("top_p", 1e-9, 1.0, "above 0 and at most 1 (off)"),
            ("min_p", 0.0, 1.0, "from 0 (off) to 1"),
            ("typical_p", 1e-9, 1.0, "above 0 and at most 1 (off)"),
            ("repetition_penalty", 1e-6, 1e6, "above 0; 1 = off"),
            ("presence_penalty", -1e6, 1e6, "a number; 0 = off"),
            ("frequency_penalty", -1e6, 1e6, "a number; 0 = off"),
            ("no_repeat_ngram", 0, 64, "from 0 (off) to 64"),
            ("min_new_tokens", 0, 2**31 - 1, "0 or more"),
            ("seed", 0, 2**32 - 1, "from 0 to 4294967295"),
        )
        for name, low, high, meaning in limits:
            value = getattr(self, name)
            kinds = int | float | np.number if isinstance(low, float) else int | np.integer
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                raise UserError(f"{name} = {value!r}: must be {meaning}")

    @property
    def active(self) -> frozenset[str]:
        """Names of the processors that do something. An n-gram's length is part of its name: it shapes the program."""
        on = {
            "logit_bias": bool(self.logit_bias),
            "repetition": self.repetition_penalty != 1,
            "banned": any(len(w) for w in self.banned),
            "frequency": bool(self.frequency_penalty or self.presence_penalty),
            "min_new": self.min_new_tokens > 0,
            f"ngram:{self.no_repeat_ngram}": self.no_repeat_ngram > 0,
            "sample": self.temperature > 0,
        }
        warpers = {
            "top_k": self.top_k > 0,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "typical": self.typical_p < 1,
        }
        return frozenset(
            name
            for name, used in {**on, **(warpers if self.temperature > 0 else {})}.items()
            if used
        )


def arrays(
    requests: Sequence[Sampling], vocab_size: int, stops: Sequence[int], copies: int = 1
) -> dict[str, np.ndarray]:
    """The settings of a batch, `copies` rows per request, side by side. Raises UserError for token ids outside the vocabulary."""
    fields = (
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    values = {name: np.array([getattr(r, name) for r in requests], np.float32) for name in fields}
    values |= {
        name: np.array([getattr(r, name) for r in requests], np.int32)
        for name in ("top_k", "min_new_tokens", "no_repeat_ngram")
    }
    for request in requests:
        ids: list[Any] = [*request.logit_bias, *(i for word in request.banned for i in word)]
        if bad := [
            i for i in ids if not isinstance(i, int | np.integer) or not 0 <= i < vocab_size
        ]:
            raise UserError(
                f"token {bad[0]!r} is outside the vocabulary of {vocab_size:,}: check logit_bias and banned"
            )
    active = active_of(requests)
    if "logit_bias" in active:
        values["logit_bias"] = np.zeros((len(requests), vocab_size), np.float32)
        for row, request in zip(values["logit_bias"], requests, strict=True):
            for i, bias in request.logit_bias.items():
                row[i] += bias
    if (
        "banned" in active
    ):  # right-aligned, -1 matches anything; rows of a shape that many lists share
        words = [
            [list(w) for w in r.banned if len(w) and list(w) not in [[s] for s in stops]]
            for r in requests
        ]
        shape = [
            1 << (max(1, n) - 1).bit_length()
            for n in (max(map(len, words)), max((len(w) for r in words for w in r), default=1))
        ]
        values["banned"] = np.full((len(requests), *shape), -2, np.int32)  # -2 matches nothing
        for i, row in enumerate(words):
            for j, word in enumerate(row):
                values["banned"][i, j] = [-1] * (shape[1] - len(word)) + word
    return {name: a.repeat(copies, 0) for name, a in values.items()} | {
        "stops": np.array(sorted(stops), np.int32)
    }


def active_of(requests: Sequence[Sampling]) -> frozenset[str]:
    return frozenset().union(*(r.active for r in requests))


def _seen(history: Mapping[str, Array], vocab_size: int, *, generated: bool) -> Array:
    """How often each token occurs, float32 [B, V]; in the generated part only, or everywhere."""
    slots = jnp.arange(history["tokens"].shape[1])[None]
    counts = slots < history["length"][:, None]
    if generated:
        counts &= slots >= history["prompt_length"][:, None]
    rows = jnp.arange(counts.shape[0])[:, None]
    return (
        jnp.zeros((counts.shape[0], vocab_size))
        .at[rows, history["tokens"]]
        .add(counts.astype(jnp.float32), mode="drop")
    )


def logit_bias(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    return logits + o["logit_bias"]


def repetition(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """Logits of tokens that occurred, in the prompt too, divided by the penalty where positive, multiplied where negative (Keskar et al. 2019)."""
    p = o["repetition_penalty"][:, None]
    return jnp.where(
        _seen(history, logits.shape[1], generated=False) > 0,
        jnp.where(logits < 0, logits * p, logits / p),
        logits,
    )


def frequency(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """Minus count * frequency_penalty, minus presence_penalty for tokens that were generated at all (OpenAI's API reference)."""
    counts = _seen(history, logits.shape[1], generated=True)
    return (
        logits
        - counts * o["frequency_penalty"][:, None]
        - (counts > 0) * o["presence_penalty"][:, None]
    )


def no_repeat_ngram(
    logits: Array, o: Mapping[str, Array], history: Mapping[str, Array], n: int
) -> Array:
    """Bans each token that would complete an n-gram which occurred before, in requests that ask for this n."""
    tokens, length = history["tokens"], history["length"]
    b, s = tokens.shape
    slots = jnp.arange(s)[None]
    match = slots + n <= length[:, None]  # a whole n-gram that starts here
    for k in range(n - 1):
        tail = jnp.take_along_axis(tokens, jnp.maximum(length - (n - 1) + k, 0)[:, None], 1)
        match &= jnp.roll(tokens, -k, 1) == tail
    match &= ((o["no_repeat_ngram"] == n) & (length >= n - 1))[:, None]
    banned = jnp.where(match, jnp.roll(tokens, -(n - 1), 1), logits.shape[1])
    return logits.at[jnp.arange(b)[:, None], banned].set(-jnp.inf, mode="drop")


def banned(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """Bans the last token of each sequence whose other tokens have just been written."""
    words, tokens, length = o["banned"], history["tokens"], history["length"]  # [B, W, n]
    n = words.shape[2]
    at = length[:, None] - (n - 1) + jnp.arange(n - 1)[None]
    tail = jnp.where(at >= 0, jnp.take_along_axis(tokens, jnp.maximum(at, 0), 1), -3)[:, None]
    hit = ((words[:, :, :-1] == tail) | (words[:, :, :-1] == -1)).all(-1)
    last = jnp.where(hit & (words[:, :, -1] >= 0), words[:, :, -1], logits.shape[1])
    return logits.at[jnp.arange(tokens.shape[0])[:, None], last].set(-jnp.inf, mode="drop")


def min_new(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    early = history["length"] - history["prompt_length"] < o["min_new_tokens"]
    return logits.at[:, o["stops"]].set(jnp.where(early[:, None], -jnp.inf, logits[:, o["stops"]]))


def top_k(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """The k largest logits and their equals."""
    ordered = jnp.sort(logits, axis=-1)
    k = jnp.where(o["top_k"] > 0, jnp.minimum(o["top_k"], logits.shape[1]), logits.shape[1])
    return jnp.where(
        logits < jnp.take_along_axis(ordered, logits.shape[1] - k[:, None], 1), -jnp.inf, logits
    )


def top_p(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """The most likely tokens until their probability reaches p (Holtzman et al. 2020); of equals, those with the larger id first."""
    order = jnp.argsort(logits, axis=-1, stable=True)
    total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, 1)), axis=-1)
    gone = (total <= 1 - o["top_p"][:, None]) & (o["top_p"][:, None] < 1)
    gone = gone.at[:, -1].set(False)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(gone).at[rows, order].set(gone), -jnp.inf, logits)


def min_p(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """Tokens with at least this share of the best one's probability (Nguyen et al. 2024)."""
    probs = jax.nn.softmax(logits)
    return jnp.where(
        (probs < o["min_p"][:, None] * probs.max(-1, keepdims=True)) & (o["min_p"][:, None] > 0),
        -jnp.inf,
        logits,
    )


def typical(logits: Array, o: Mapping[str, Array], history: Mapping[str, Array]) -> Array:
    """Tokens whose surprise is closest to the expected one, until their probability reaches the mass (Meister et al. 2022)."""
    logp = jax.nn.log_softmax(logits)
    probs = jnp.exp(logp)
    entropy = -jnp.where(probs > 0, probs * logp, 0.0).sum(-1, keepdims=True)
    distance = jnp.abs(-logp - entropy)
    order = jnp.argsort(distance, axis=-1, stable=True)
    total = jnp.cumsum(jnp.take_along_axis(probs, order, 1), axis=-1)
    mass = o["typical_p"][:, None]
    last = jnp.minimum((total < mass).sum(-1, keepdims=True), logits.shape[1] - 1)
    limit = jnp.take_along_axis(jnp.take_along_axis(distance, order, 1), last, 1)
    return jnp.where((distance > limit) & (mass < 1), -jnp.inf, logits)


# In transformers' order; the warpers come after temperature and only to requests that sample.
PROCESSORS: dict[str, Callable[..., Array]] = {
    "logit_bias": logit_bias,
    "repetition": repetition,
    "frequency": frequency,
    "ngram": no_repeat_ngram,
    "banned": banned,
    "min_new": min_new,
}


WARPERS: dict[str, Callable[..., Array]] = {
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical": typical,
}


def process(
    logits_BV: Array,
    options: Mapping[str, Array],
    history: Mapping[str, Array],
    active: frozenset[str],
) -> Array:
    """Logits after all active processors, -inf for what is out. history: tokens [B, S], length [B], prompt_length [B].

    Where every token is out, the logits come back as they were: a distribution over nothing has no sample.
    """
    original = logits_BV
    for name, processor in PROCESSORS.items():
        for one in sorted(a for a in active if a.partition(":")[0] == name):
            sizes = [int(one.partition(":")[2])] if ":" in one else []
            logits_BV = processor(logits_BV, options, history, *sizes)
    if "sample" in active:
        warm = options["temperature"][:, None] > 0
        warped = logits_BV / jnp.where(warm, options["temperature"][:, None], 1.0)
        for name, warper in WARPERS.items():
            if name in active:
                warped = warper(warped, options, history)
        logits_BV = jnp.where(warm, warped, logits_BV)
    return jnp.where((logits_BV == -jnp.inf).all(-1, keepdims=True), original, logits_BV)


def choose(
    logits_BV: Array, options: Mapping[str, Array], keys_B: Array, active: frozenset[str]
) -> Array:
    """int32 [B]: a draw where the request samples, else the largest logit."""
    best = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if "sample" not in active:
        return best
    drawn = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    return jnp.where(options["temperature"] > 0, drawn, best)


def logprob(logits: Array, tokens: Array) -> Array:
    """log softmax(logits [..., V]) at tokens [...], float32."""
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
