"""The host's half of generation: what was asked for, and the texts as they grow.

`build_request` checks prompts and options and turns them into token ids; the engine feeds each new
token into a `SequenceState`, which ends in a `Completion`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.core.characters import check_characters
from gptjax.generation.constraints import GuideState, build_guide
from gptjax.generation.options import GenerationOptions
from gptjax.generation.sampling import Sampling
from gptjax.tokenizer.base import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    >>> completion = lm.generate("The quick", max_new_tokens=6)
    >>> completion.text, completion.finish_reason, len(completion.logprobs)
    (' brown', 'length', 6)
    """

    tokens: list[int]  # new ids, without the end token
    text: str
    logprobs: list[float]  # of each new token: the model's own, before any processor
    finish_reason: str  # "stop" (an end token or a stop text) or "length"
    score: float | None = None  # of beam search
    prompt_logprobs: list[float] | None = None  # of each prompt token but the first, if asked for
    end: int | None = None  # the end token, where one came


class SequenceState:
    """One completion as it grows, token by token."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        eos_ids: Sequence[int],
        prompt: Sequence[int] = (),
        guide: GuideState | None = None,
    ):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.reason = ""  # why it is finished; empty while it grows
        self.end: int | None = None
        self._decoder = StreamDecoder(tokenizer, prompt) if tokenizer else None
        self._stop, self._eos_ids = stop, set(eos_ids)
        self.guide, self._given = guide, 0
        self._end_with_guide()

    def feed(self, token: int, logprob: float) -> None:
        """Adds a token; none is added after the end."""
        if self.reason:
            return
        if self.guide:
            if self._given:
                self._given -= 1  # its guide knows it
            else:
                self.guide.accept(token)
        if token in self._eos_ids:
            self.end = token
            self.finish("stop")
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._decoder:
            before = len(self.text)
            self.text += self._decoder.feed(token)
            self._cut_at_stop(before)
        self._end_with_guide()

    def take_given(self, room: int) -> list[int]:
        """Tokens, at most `room`, that the grammar leaves no choice about. They must be fed next;
        the guide is behind them already."""
        given = self.guide.forced()[:room] if self.guide and not self.reason else []
        for token in given:
            self.guide_on(token)
        return given

    def guide_on(self, token: int) -> None:
        """Lets the grammar go on by a token that is fed later."""
        if self.guide:
            self.guide.accept(token)
            self._given += 1

    def _end_with_guide(self) -> None:
        """Ends the text with its grammar, or where the grammar leaves no token; not before the
        tokens are fed that the grammar knows."""
        if self.guide and not self._given and not self.reason:
            if self.guide.finished:
                self.finish("stop")
            elif self.guide.fault:
                cli.say(f"note: a text ends before its grammar does: {self.guide.fault}")
                self.finish("length")

    def _cut_at_stop(self, before: int) -> None:
        """Ends the text at the first stop text that the characters from `before` on complete."""
        places = []
        for stop in self._stop:
            at = self.text.find(stop, max(before - len(stop) + 1, 0))
            if at >= 0:
                places.append(at)
        if places:
            self.text, self.reason = self.text[: min(places)], "stop"

    def finish(self, reason: str) -> None:
        """Ends the text, unless it has ended: half a character at its end becomes U+FFFD."""
        if not self.reason:
            before = len(self.text)
            self.text += self._decoder.finish() if self._decoder else ""
            self._cut_at_stop(before)
            self.reason = self.reason or reason

    @property
    def safe(self) -> int:
        """How many characters of `text` no later token can change or take back."""
        if self.reason:
            return len(self.text)
        held_back = 0  # the longest end of the text that may be the beginning of a stop text
        for stop in self._stop:
            for size in range(1, len(stop)):
                if self.text.endswith(stop[:size]):
                    held_back = max(held_back, size)
        return len(self.text) - held_back

    def completion(self) -> Completion:
        return Completion(self.tokens, self.text, self.logprobs, self.reason, end=self.end)


@dataclasses.dataclass
class Request:
    """A checked batch: `n` sequences for each prompt, side by side."""

    prompts: list[list[int]]
    samplings: list[Sampling]  # one for each prompt, with its own seed and banned ids
    sequences: list[SequenceState]  # n for each prompt
    n: int
    max_new_tokens: int
    eos_ids: list[int]
    has_stop_text: bool
    context_shift: bool  # go on past the context
    guided: bool = False  # each text follows a grammar

    @property
    def finished(self) -> bool:
        return all(sequence.reason for sequence in self.sequences)

    @property
    def guides(self) -> list[GuideState]:
        """Of each text, where they follow grammars."""
        return [sequence.guide for sequence in self.sequences if sequence.guide]

    def limit(self, length: int, generated: int, context: int) -> int:
        """The longest length of a text with `length` tokens, `generated` of them new.

        The last token that a full context predicts is never fed, hence the 1.
        """
        return min(length + self.max_new_tokens - generated, context + 1)


Prompt = str | Sequence[int]


def build_request(
    prompts: list[list[int]],
    options: GenerationOptions,
    *,
    tokenizer: Tokenizer | None,
    context: int,
    eos_ids: Sequence[int],
    banned: list[list[int]],
    vocab_size: int = 0,
) -> Request:
    """The request for prompts (ids), all of it checked. Raises UserError.

    eos_ids: ids that end a text; banned: `options.banned` as ids (`encode_banned`); vocab_size: the
    model's, which a grammar's masks have.
    """
    guide = build_guide(tokenizer, vocab_size, eos_ids, options)
    stop = options.stop_texts
    if stop and tokenizer is None:
        raise UserError("stop texts need a tokenizer, which this checkpoint lacks: use stop_tokens")
    if "" in stop:
        raise UserError("stop texts must not be empty")
    for text in stop:
        check_characters(text, "a stop text")
    fitting, samplings, sequences = [], list[Sampling](), []
    for i, prompt in enumerate(prompts):
        fitting.append(
            fit_prompt(prompt, context, options.max_new_tokens, context_shift=options.context_shift)
        )
        seed = (options.seed + i) % 2**32
        samplings.append(dataclasses.replace(options, banned=banned, seed=seed))
        for _ in range(options.n):
            state = guide.start() if guide else None
            sequences.append(SequenceState(tokenizer, stop, eos_ids, prompt, state))
    return Request(
        prompts=fitting,
        samplings=samplings,
        sequences=sequences,
        n=options.n,
        max_new_tokens=options.max_new_tokens,
        eos_ids=list(eos_ids),
        has_stop_text=bool(stop),
        context_shift=options.context_shift,
        guided=guide is not None,
    )


def list_prompts(prompts: Any) -> list[Prompt]:
    """One prompt (a text or ids) or many, as a list of prompts. Raises UserError for none."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if prompts is None or not len(prompts):
        raise UserError("no prompts: give a text or a list of them")
    if all(isinstance(item, int | np.integer) for item in prompts):
        return [prompts]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Sequence | np.ndarray):
            raise UserError(f"prompt {i} is {prompt!r}: give a text or a list of token ids")
    return list(prompts)


def encode_banned(
    words: Sequence[str | int | Sequence[int]],
    tokenizer: Tokenizer | None,
    check_ids: Callable[[Sequence[int]], list[int]],
) -> list[list[int]]:
    """Banned words as sequences of ids: a text with and without a space before it.

    check_ids: returns the ids as a list, or raises UserError for one outside the vocabulary.
    Raises UserError for words without a tokenizer.
    """
    sequences = []
    for word in [words] if isinstance(words, str) else words:
        if isinstance(word, int | np.integer):
            sequences.append(check_ids([int(word)]))
        elif not isinstance(word, str):
            sequences.append(check_ids(word))
        elif tokenizer is None:
            raise UserError(
                "banned words need a tokenizer, which this checkpoint lacks: "
                "give lists of token ids"
            )
        else:
            sequences += [tokenizer.encode(word), tokenizer.encode(" " + word)]
    return sequences


def fit_prompt(
    prompt: list[int], context: int, max_new_tokens: int, *, context_shift: bool
) -> list[int]:
    """The prompt, or with `context_shift` its end.

    Raises UserError where prompt and new tokens exceed the context and may not shift.
    """
    if context_shift:
        return prompt if len(prompt) < context else prompt[-max(context // 2, 1) :]
    if len(prompt) > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context is {context}: "
            "shorten it, or let it slide (overflow='slide', --context_shift)"
        )
    if len(prompt) + max_new_tokens > context + 1:
        raise UserError(
            f"{len(prompt)} prompt tokens and max_new_tokens = {max_new_tokens} exceed the model's "
            f"context of {context}:\nask for at most {context + 1 - len(prompt)}, or let the "
            "oldest text fall out of sight (overflow='slide', --context_shift)"
        )
    return prompt
