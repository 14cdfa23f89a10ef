"""The host's half of generation: what was asked for, what has come, and the loop that takes tokens off the device in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gptjax.config.errors import UserError
from gptjax.generation.sampling import Sampling
from gptjax.tokenizer.base import StreamDecoder, Tokenizer


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


class SequenceState:
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
        found = [
            at for s in self._stop if (at := self.text.find(s, max(before - len(s) + 1, 0))) >= 0
        ]
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
        return len(self.text) - max(
            (k for s in self._stop for k in range(1, len(s)) if self.text.endswith(s[:k])),
            default=0,
        )

    def completion(self) -> Completion:
        return Completion(self.tokens, self.text, self.logprobs, self.reason, end=self.end)


@dataclasses.dataclass
class Request:
    """A checked batch: prompts (ids), one sampling a prompt, `n` rows a prompt, side by side."""

    prompts: list[list[int]]
    samplings: list[Sampling]
    rows: list[SequenceState]
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
