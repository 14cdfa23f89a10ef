"""/v1/chat/completions: conversations, through the checkpoint's own template, to answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.characters import shorten
from gptjax.generation.constraints import build_guide
from gptjax.generation.options import GenerationOptions
from gptjax.generation.slots import Job
from gptjax.serving import fields, tool_calls
from gptjax.serving.answers import Answer, Choice, Scored
from gptjax.serving.errors import ApiError, wrong_field
from gptjax.serving.scheduler import Piece
from gptjax.serving.served import Served, conflict
from gptjax.tokenizer import chat_template


class Chat(Answer):
    """One request. Raises ApiError, UserError."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, body: Mapping[str, Any], served: Served):
        asked = fields.check(body, fields.CHAT)
        choice = asked.get("tool_choice", "auto")
        tools = asked.get("tools", []) if choice != "none" else []
        self._forced = [] if choice in ("none", "auto") else _forced_tools(choice, tools)
        if self._forced:
            asked.pop("response_format", None)  # of a text, which this answer is not
        elif tools and not asked.get("parallel_tool_calls", True):
            name = "parallel_tool_calls"
            message = f"{name}: an answer is limited to one call only where tool_choice forces it"
            raise ApiError(400, message, param=name, code="unsupported_field")
        super().__init__(asked, served)
        self._logprobs: bool = asked.get("logprobs", False)
        if "top_logprobs" in asked and not self._logprobs:
            raise wrong_field("top_logprobs", "top_logprobs is for logprobs = true")
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
        if self._forced:
            options = self._force(options)
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

    def _force(self, options: GenerationOptions) -> GenerationOptions:
        """So that the answer is a call, which stop texts do not cut."""
        if self._constraint:
            raise conflict([self._constraint, "tool_choice"])
        try:
            return dataclasses.replace(options, grammar=tool_calls.grammar(self._forced), stop=())
        except UserError as error:
            raise self.fault(error) from None

    def fault(self, error: UserError) -> ApiError:
        for tool in self._forced:
            try:
                only = GenerationOptions(schema=tool_calls.arguments_schema(tool))
                vocab_size, eos_ids = self.lm.config.vocab_size, self.lm.eos_ids
                build_guide(self.tokenizer, vocab_size, eos_ids, only)
            except UserError as own:
                reason = str(own).removeprefix("schema: ")
                name = shorten(tool["function"]["name"])
                return wrong_field("tools", f"tools: {name}: {reason}")
        return super().fault(error)

    def _read(self, text: str, reason: str) -> tool_calls.Parsed:
        if self._forced:
            return tool_calls.read_forced(text, self._forced, whole=reason == "stop")
        return tool_calls.parse(text, self._tool_names)

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
                rest, calls = self._read(choice.held, choice.reason)
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
                content, calls = self._read(choice.text, choice.reason)
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
    """The tools of which the answer must call one. Raises ApiError."""
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
