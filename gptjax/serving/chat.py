"""/v1/chat/completions: conversations, through the checkpoint's own template, to answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.characters import shorten
from gptjax.generation.options import CONSTRAINTS, GenerationOptions
from gptjax.generation.slots import Job
from gptjax.serving import fields, tool_calls
from gptjax.serving.answers import Answer, Choice, Scored
from gptjax.serving.errors import ApiError, wrong_field
from gptjax.serving.scheduler import Piece
from gptjax.serving.served import Served
from gptjax.tokenizer import chat_template


class Chat(Answer):
    """One request. Raises ApiError, UserError."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, body: Mapping[str, Any], served: Served):
        asked = fields.check(body, fields.CHAT)
        super().__init__(asked, served)
        self._logprobs: bool = asked.get("logprobs", False)
        if "top_logprobs" in asked and not self._logprobs:
            raise wrong_field("top_logprobs", "top_logprobs is for logprobs = true")
        tools = asked.get("tools", []) if asked.get("tool_choice") != "none" else []
        forced = _forced_tools(asked.get("tool_choice", "auto"), tools)
        self._tool_names = {tool["function"]["name"] for tool in tools}
        ids = self._encode(asked["messages"], tools)
        self.prompt_tokens = len(ids)
        name = "max_completion_tokens"
        if name in asked and asked.get("max_tokens", asked[name]) != asked[name]:
            raise wrong_field(name, f"max_tokens and {name} are given and differ")
        name = name if name in asked else "max_tokens"
        room = served.room(ids, "messages")
        count = served.new_tokens(asked.get(name), room, room, name)
        options = dataclasses.replace(served.options(asked), max_new_tokens=count)
        if forced:
            options = self._force(options, forced)
        for index in range(asked.get("n", 1)):
            seed = (options.seed + index) % 2**32
            job = Job(
                ids,
                dataclasses.replace(options, seed=seed),
                adapter=self.adapter,
                alternatives=asked.get("top_logprobs", 0),
            )
            self.jobs.append(job)
            self.choices.append(_Held(index, self.tokenizer, job))

    def _force(self, options: GenerationOptions, tools: Sequence[Any]) -> GenerationOptions:
        """So that the answer is a call of one of these tools."""
        if any(getattr(options, name) is not None for name in CONSTRAINTS):
            names = f"{self._constraint} and tool_choice"
            raise ApiError(
                400, f"{names}: a text follows one of them", param=names, code="conflict"
            )
        self._constraint = "tools"  # what a fault of the grammar is about
        try:
            return dataclasses.replace(options, grammar=tool_calls.grammar(tools))
        except UserError as error:
            raise self.fault(error) from None

    def _encode(self, messages: Sequence[Any], tools: Sequence[Any]) -> list[int]:
        served = self.served
        if not self.tokenizer.template_for(tools) and not self.tokenizer.templates:
            raise ApiError(
                400,
                f"{self.model} has no chat template, so it is no chat model: use "
                "/v1/completions, serve a checkpoint that was tuned for dialogue, or start the "
                "server with --chat_template=plain",
                param="messages",
                code="no_chat_template",
            )
        size = sum(len(str(message.get("content", ""))) for message in messages)
        served.check_size(size, "messages")
        served.check_size(len(messages) * served.longest, "messages")  # a token each, at least
        try:
            ids = chat_template.encode(self.tokenizer, messages, tools=tools or None)
        except UserError as error:
            raise wrong_field("messages", f"messages: {error}") from None
        return [self.tokenizer.eot] * self.lm.prompt_tokens + ids

    def first_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self.chunk([self._part(choice.index, delta, [])]) for choice in self.choices]

    def parts(
        self, choice: Choice, piece: Piece, text: str, shown: Sequence[Scored]
    ) -> list[dict[str, Any]]:
        assert isinstance(choice, _Held)
        parts, reason = [], choice.reason or None
        if self._tool_names:
            text = choice.hold(text)
            if choice.reason and choice.held:
                rest, calls = tool_calls.parse(choice.held, self._tool_names)
                text += rest
                reason = "tool_calls" if calls and reason == "stop" else reason
                for i, call in enumerate(calls):
                    delta = {"tool_calls": [{"index": i, **call}]}
                    parts.append(self._part(choice.index, delta, []))
        if text or (self._logprobs and shown):
            parts.insert(0, self._part(choice.index, {"content": text}, shown))
        if reason:
            parts.append(self._part(choice.index, {}, [], reason))
        return parts

    def _part(
        self, index: int, delta: Any, shown: Sequence[Scored], reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._show(shown) if self._logprobs and shown else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def results(self) -> list[dict[str, Any]]:
        results = []
        for choice in self.choices:
            content, calls = choice.text, list[Any]()
            if self._tool_names:
                content, calls = tool_calls.parse(choice.text, self._tool_names)
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            reason = choice.reason
            if calls:
                message |= {"content": content or None, "tool_calls": calls}
                reason = "tool_calls" if reason == "stop" else reason
            results.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": self._show(choice.scored) if self._logprobs else None,
                    "finish_reason": reason,
                }
            )
        return results

    def _show(self, shown: Sequence[Scored]) -> dict[str, Any]:
        """OpenAI's form of log-probabilities in chats."""
        content = []
        for scored in shown:
            tops = [self._name(token, value) for token, value in scored.alternatives]
            content.append({**self._name(scored.token, scored.logprob), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _name(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.served.token_bytes(token)
        return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}


def _forced_tools(choice: Any, tools: Sequence[Any]) -> Sequence[Any]:
    """The tools of which the answer must call one; none where it may be text."""
    if choice in ("none", "auto"):
        return []
    if not tools:
        raise wrong_field("tool_choice", "tool_choice asks for a call, and no tools are given")
    if choice == "required":
        return tools
    name = choice["function"]["name"]
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise wrong_field("tool_choice", f"tool_choice: there is no tool {shorten(name)!r}")
    return named


class _Held(Choice):
    """An answer of which is held back what may be a call of a tool."""

    held = ""

    def hold(self, text: str) -> str:
        """Takes new text; returns what of it is text in any case."""
        if self.held:
            self.held += text
            return ""
        begin = tool_calls.MAY_BEGIN.search(text)
        if begin is None:
            return text
        self.held = text[begin.start() :]
        return text[: begin.start()]
