"""The host's half of generation: what was asked for, what has come, and the loop that takes tokens off the device in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import decode, model, programs, speculate
from gptjax.config import ModelConfig, UserError
from gptjax.sampling import Sampling, active_of, arrays
from gptjax.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated. tokens: new ids, without the end token; logprobs: the model's own, of each; score: beam search's. finish_reason:
    "stop" (end token or stop text) or "length"; prompt_logprobs: where asked, of each prompt token but the first; end: the end token, where
    one came."""

    tokens: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str
    score: float | None = None
    prompt_logprobs: list[float] | None = None
    end: int | None = None


class Row:
    """One completion as it grows. `safe`: how much of `text` no later token can change or take back."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stops: Sequence[int]):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.reason = ""
        self.end: int | None = None
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._size = tokenizer.vocab_size if tokenizer else 0
        self._stop, self._stops = stop, set(stops)

    def feed(self, token: int, logprob: float) -> None:
        if self.reason:
            return
        if token in self._stops:
            self.end = token
            self.finish("stop")
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._decoder and token < self._size:
            before = len(self.text)
            self.text += self._decoder.feed(token)
            self._look_for_stop(before)

    def _look_for_stop(self, before: int) -> None:
        found = [at for s in self._stop if (at := self.text.find(s, max(before - len(s) + 1, 0))) >= 0]
        if found:
            self.text, self.reason = self.text[: min(found)], "stop"

    def finish(self, reason: str) -> None:
        if not self.reason:
            before = len(self.text)
            self.text += self._decoder.finish() if self._decoder else ""
            self._look_for_stop(before)
            self.reason = self.reason or reason

    @property
    def safe(self) -> int:
        if self.reason:
            return len(self.text)
        return len(self.text) - max((k for s in self._stop for k in range(1, len(s)) if self.text.endswith(s[:k])), default=0)

    def completion(self) -> Completion:
        return Completion(self.tokens, self.text, self.logprobs, self.reason, end=self.end)


@dataclasses.dataclass
class Request:
    """A checked batch: prompts (ids), one sampling a prompt, `n` rows a prompt, side by side."""

    prompts: list[list[int]]
    samplings: list[Sampling]
    rows: list[Row]
    n: int
    max_new_tokens: int
    stops: list[int]
    has_stop_text: bool
    slide: bool


def fit(prompt: list[int], context: int, max_new_tokens: int, *, slide: bool) -> list[int]:
    """The prompt, or with `slide` its end. Raises UserError where prompt and new tokens exceed the context and may not slide."""
    if slide:
        return prompt if len(prompt) < context else prompt[-max(context // 2, 1) :]
    if len(prompt) > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context is {context}: shorten it, or let it slide (overflow='slide', --rolling)"
        )
    if len(prompt) + max_new_tokens > context + 1:
        raise UserError(
            f"{len(prompt)} prompt tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {context}:\n"
            f"ask for at most {context + 1 - len(prompt)}, or let the oldest text fall out of sight (overflow='slide', --rolling)"
        )
    return prompt


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Guesses a pass; a draft model's config, weights and type of cache, or None for prompt lookup."""

    count: int
    draft_config: ModelConfig | None = None
    draft_weights: Any = None
    draft_cache_dtype: str = ""


def run(
    config: ModelConfig, weights: Any, request: Request, *, steps: Sequence[int], cache_dtype: str = "", guess: Speculation | None = None
) -> Iterator[None]:
    """Fills the request's rows; yields whenever tokens came. steps: how many at a time, the last number again and again.

    Where text slides, each time that the context is full its latest half is read again from the start, and goes on.
    """
    active = active_of(request.samplings)
    options = jax.device_put(arrays(request.samplings, config.vocab_size, request.stops, request.n))
    full = config.context + 1  # the last token that a full context predicts is never fed
    state = _begin(config, weights, request, request.prompts, [0] * len(request.prompts), request.n, cache_dtype, guess)
    known, turn = np.asarray(state["length"]), 0
    while True:
        count, turn = steps[min(turn, len(steps) - 1)], turn + 1
        if guess:
            extra = dict(count=guess.count, draft_config=guess.draft_config, draft_params=guess.draft_weights)
            state = speculate.advance(config, weights, state, options, np.int32(count), active=active, **extra)
        else:
            state = decode.advance(config, weights, state, options, np.int32(count), active=active)
        tokens, lengths, logprobs = (np.asarray(state[name]) for name in ("tokens", "length", "logprobs"))
        done = np.asarray(state["done"]).copy()
        for i, row in enumerate(request.rows):
            for at in range(known[i], lengths[i]):
                row.feed(int(tokens[i, at]), float(logprobs[i, at]))
            if len(row.tokens) >= request.max_new_tokens:
                row.finish("length")
            done[i] |= bool(row.reason)
        known = lengths
        if all(row.reason for row in request.rows):
            yield
            return
        yield
        if done.all():  # some stand at the end of the context and go on
            rows = [r.tolist()[: lengths[i]] for i, r in enumerate(tokens)]
            prompts = [r[-max(full // 2, 1) :] if not row.reason else r[-1:] for r, row in zip(rows, request.rows, strict=True)]
            state = _begin(config, weights, request, prompts, [len(row.tokens) for row in request.rows], 1, cache_dtype, guess)
            state["copy"] = jax.device_put(np.tile(np.arange(request.n, dtype=np.uint32), len(request.prompts)))
            known = np.asarray(state["length"])
            done = np.array([bool(row.reason) for row in request.rows])
        state["done"] = jax.device_put(done)


def compile_ahead(config: ModelConfig, weights: Any, request: Request, *, cache_dtype: str = "", folder: str | Path | None = None) -> None:
    """Makes ready the programs that `run` begins with; see `programs.make_ready`. `weights` may be shapes."""
    places = _places(config, request, request.prompts, [0] * len(request.prompts), request.n, None)
    tokens, length, state = decode.host_state(request.prompts, **places)
    state["cache"] = jax.eval_shape(lambda: model.init_cache(config, len(state["length"]), tokens.shape[1], dtype=cache_dtype))
    options = arrays(request.samplings, config.vocab_size, request.stops, request.n)
    step = decode.advance.call(config, weights, state, options, np.int32(0), active=active_of(request.samplings))
    programs.make_ready([step, decode.prefill.call(config, weights, tokens, length, cache_dtype=cache_dtype, copies=request.n)], folder)


def _begin(
    config: ModelConfig, weights: Any, request: Request, prompts: list[list[int]], made: list[int], copies: int, cache_dtype: str, guess: Speculation | None
) -> decode.State:  # fmt: skip
    state = decode.start(config, weights, prompts, cache_dtype=cache_dtype, **_places(config, request, prompts, made, copies, guess))
    if guess:
        state["passes"] = jax.device_put(np.int32(0))
        if guess.draft_config:
            cache = decode.prefill(guess.draft_config, guess.draft_weights, state["tokens"], state["length"], cache_dtype=guess.draft_cache_dtype)
            state["draft_cache"] = cache
    return state


def _places(
    config: ModelConfig, request: Request, prompts: list[list[int]], made: list[int], copies: int, guess: Speculation | None
) -> dict[str, Any]:  # fmt: skip
    """What `decode.host_state` is told of these prompts."""
    limits = [min(len(p) + request.max_new_tokens - m, config.context + 1) for p, m in zip(prompts, made, strict=True)]
    slots = decode.bucket(max(limits) + (guess.count + 1 if guess else 0), config.context + (guess.count + 2 if guess else 1))
    seeds = [s.seed for s in request.samplings for _ in range(request.n if len(prompts) != len(request.samplings) else 1)]
    return {"limits": limits, "slots": slots, "seeds": seeds, "copies": copies, "made": made}
