"""A request's texts as they grow: what `completions.py` and `chat.py` have in common.

In: `Piece`s of the scheduler. Out: the parts of a response, whole or as chunks of a stream.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.generation.slot_programs import Alternatives
from gptjax.generation.slots import Job
from gptjax.serving.errors import ApiError, wrong_field
from gptjax.serving.scheduler import Piece
from gptjax.serving.served import CONSTRAINTS, Served, Usage, new_id
from gptjax.tokenizer.base import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Scored:
    """A token of an answer."""

    token: int
    logprob: float | None  # None: nothing stands before it
    alternatives: Alternatives
    offset: int  # where its text begins


class Choice:
    """One text. keeps: False drops what is written (max_tokens = 0)."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, job: Job, *, before: int = 0, keeps: bool = True
    ):
        self.index, self.keeps = index, keeps
        self.text, self.reason = "", ""
        self.tokens = 0
        self.logprobs: list[float] = []
        self.scored: list[Scored] = []  # all that were shown
        self._decoder = StreamDecoder(tokenizer, job.prompt)
        self._held: list[Scored] = []  # tokens whose text may still be taken back
        self._start = self._offset = before

    def feed(self, piece: Piece) -> tuple[str, list[Scored]]:
        """Takes a piece; returns the text and tokens that can be shown now."""
        self.reason = piece.reason
        if not self.keeps:
            self.reason = "length" if piece.reason else ""
            return "", []
        self.text += piece.text
        self.tokens += len(piece.tokens)
        self.logprobs += piece.logprobs
        for token, logprob, alternatives in zip(
            piece.tokens, piece.logprobs, piece.alternatives, strict=True
        ):
            self._held.append(Scored(token, logprob, alternatives, self._offset))
            self._offset += len(self._decoder.feed(token))
        shown = self._held
        if not self.reason or piece.cut:
            end = self._start + len(self.text)
            shown = [scored for scored in self._held if scored.offset < end]
        self._held = self._held[len(shown) :]
        self.scored += shown
        return piece.text, shown

    @property
    def likelihood(self) -> float:
        """Mean log-probability."""
        return float(np.mean(self.logprobs)) if self.logprobs else 0.0


class Answer(abc.ABC):
    """A checked request and what it gets. `jobs` are for the scheduler. Raises ApiError."""

    kind = ""  # `object` of a response
    chunk_kind = ""  # and of a chunk
    prefix = ""  # of its id

    def __init__(self, fields: Mapping[str, Any], served: Served):
        self.served, self.adapter = served, served.adapter(fields.get("model"))
        self.lm = served.engine.models[self.adapter]
        self.tokenizer = self.lm.text_tokenizer
        self.model = self.adapter or served.name
        self.jobs: list[Job] = []
        self.choices: list[Choice] = []  # one for each job
        self.stream: bool = fields.get("stream", False)
        self.include_usage: bool = fields.get("stream_options", {}).get("include_usage", False)
        if "stream_options" in fields and not self.stream:
            raise ApiError(
                400, "stream_options is for stream = true", param="stream_options", code="conflict"
            )
        self._constraint = next((n for n in CONSTRAINTS if n in fields), None)
        self.prompt_tokens = 0
        self._id, self._created = new_id(self.prefix), int(time.time())

    def fault(self, error: UserError) -> ApiError:
        """What an engine says of a job, in the words of the request."""
        option, colon, reason = str(error).partition(": ")
        if self._constraint and colon and option in CONSTRAINTS.values():
            return wrong_field(self._constraint, f"{self._constraint}: {reason}")
        return ApiError(400, str(error))

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, sum(choice.tokens for choice in self.choices))

    def feed(self, piece: Piece) -> list[dict[str, Any]]:
        """Takes a piece; returns the chunks of a stream that it makes."""
        choice = self.choices[piece.index]
        text, shown = choice.feed(piece)
        return [self.chunk([part]) for part in self.parts(choice, piece, text, shown)]

    def chunk(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        return self._envelope(self.chunk_kind, choices, **more)

    def first_chunks(self) -> list[dict[str, Any]]:
        """Chunks before any token."""
        return []

    def last_chunks(self) -> list[dict[str, Any]]:
        """Chunks after all texts."""
        return [self.chunk([], usage=self.usage.body())] if self.include_usage else []

    def response(self) -> dict[str, Any]:
        """The whole answer."""
        return self._envelope(self.kind, self.results(), usage=self.usage.body())

    def _envelope(self, kind: str, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": list(choices),
            **more,
        }

    @abc.abstractmethod
    def parts(
        self, choice: Choice, piece: Piece, text: str, shown: Sequence[Scored]
    ) -> list[dict[str, Any]]:
        """What a piece adds to the `choices` of a stream."""

    @abc.abstractmethod
    def results(self) -> list[dict[str, Any]]:
        """The `choices` of the whole answer."""
