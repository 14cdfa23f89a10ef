"""/v1/completions: prompts to texts that go on from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.generation.slots import Job
from gptjax.serving import fields
from gptjax.serving.answers import Answer, Choice, Scored
from gptjax.serving.errors import wrong_field
from gptjax.serving.scheduler import Piece
from gptjax.serving.served import Served, token_text
from gptjax.tokenizer.base import StreamDecoder

MAX_TOKENS = 16  # OpenAI's default


def list_prompts(value: Any) -> list[str | list[int]]:
    """One prompt, a text or ids, or several of them, as a list."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


class Completions(Answer):
    """One request. Raises ApiError, UserError."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: Mapping[str, Any], served: Served):
        asked = fields.check(body, fields.COMPLETIONS)
        super().__init__(asked, served)
        self._n = asked.get("n", 1)
        self._drawn = asked.get("best_of", self._n)
        if self._drawn < self._n:
            raise wrong_field("best_of", f"best_of is {self._drawn}, and n is {self._n}")
        if self._drawn > self._n and self.stream:
            raise wrong_field("best_of", "which texts are best is known at their end: stream none")
        self._logprobs: int | None = asked.get("logprobs")
        self._echo: bool = asked.get("echo", False)
        options = served.options(asked)
        for prompt in list_prompts(asked["prompt"]):
            ids = served.encode(prompt, self.adapter, "prompt")
            self.prompt_tokens += len(ids)
            count = served.new_tokens(
                asked.get("max_tokens"), MAX_TOKENS, served.room(ids, "prompt"), "max_tokens"
            )
            echo = ""
            if self._echo:
                echo = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            for _ in range(self._drawn):
                index = len(self.jobs)
                seed = (options.seed + index) % 2**32
                job = Job(
                    ids,
                    dataclasses.replace(options, max_new_tokens=max(count, 1), seed=seed),
                    adapter=self.adapter,
                    alternatives=self._logprobs or 0,
                    prompt_logprobs=self._echo and self._logprobs is not None,
                )
                self.jobs.append(job)
                choice = _Echoed(index, self.tokenizer, job, before=len(echo), keeps=count > 0)
                choice.echo = echo
                self.choices.append(choice)

    def parts(
        self, choice: Choice, piece: Piece, text: str, shown: Sequence[Scored]
    ) -> list[dict[str, Any]]:
        assert isinstance(choice, _Echoed)
        shown = list(shown)
        if not choice.has_begun:
            choice.has_begun = True
            text = choice.echo + text
            if self.jobs[piece.index].prompt_logprobs:
                choice.prompt = self._score_prompt(self.jobs[piece.index], piece)
                shown = choice.prompt + shown
        wants_tokens = self._logprobs is not None and shown
        if not (text or wants_tokens or choice.reason):
            return []
        return [self._part(choice.index, text, shown, choice.reason or None)]

    def _part(
        self, index: int, text: str, shown: Sequence[Scored], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._show(shown)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _score_prompt(self, job: Job, piece: Piece) -> list[Scored]:
        """The prompt's tokens; nothing stands before the first."""
        decoder, offset = StreamDecoder(self.tokenizer), 0
        scores: list[Any] = [(None, []), *piece.prompt_scores]
        result = []
        for token, (logprob, alternatives) in zip(job.prompt, scores, strict=True):
            result.append(Scored(token, logprob, alternatives, offset))
            offset += len(decoder.feed(token))
        return result

    def _show(self, shown: Sequence[Scored]) -> dict[str, Any]:
        """OpenAI's form of log-probabilities in completions."""
        tops: list[dict[str, float] | None] = []
        for scored in shown:
            tops.append({self._text(token): value for token, value in scored.alternatives})
            if scored.logprob is None:
                tops[-1] = None
        return {
            "tokens": [self._text(scored.token) for scored in shown],
            "token_logprobs": [scored.logprob for scored in shown],
            "top_logprobs": tops if self._logprobs else None,
            "text_offset": [scored.offset for scored in shown],
        }

    def _text(self, token: int) -> str:
        return token_text(self.served.token_bytes(token))

    def results(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        for first in range(0, len(self.choices), self._drawn):
            group = self.choices[first : first + self._drawn]
            if self._drawn > self._n:
                group = sorted(group, key=lambda choice: -choice.likelihood)[: self._n]
            for choice in group:
                assert isinstance(choice, _Echoed)
                shown = [*choice.prompt, *choice.scored]
                text = choice.echo + choice.text
                results.append(self._part(len(results), text, shown, choice.reason))
        return results


class _Echoed(Choice):
    """A text after its prompt."""

    echo = ""
    has_begun = False
    prompt: Sequence[Scored] = ()
