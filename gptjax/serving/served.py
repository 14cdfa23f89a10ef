"""What a server serves: a model, its adapters, and the limits of a request."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.generation.options import GenerationOptions
from gptjax.generation.slots import SlotEngine
from gptjax.serving.errors import ApiError

RENAMED = {  # fields of a request: the option that each is
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "stop_tokens",
    "ignore_eos": "ignore_end",
}
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "no_repeat_ngram", "logit_bias", "stop"),
)


class Served:
    """name: the checkpoint's id; max_tokens: the most that a request may ask for, 0 = any."""

    def __init__(self, name: str, engine: SlotEngine, *, max_tokens: int = 0):
        self.name, self.engine, self.max_tokens = name, engine, max_tokens
        self.created = int(time.time())
        self._tokenizer = tokenizer = engine.lm.text_tokenizer
        self._control = {number: name.encode() for name, number in tokenizer.control.items()}
        self.longest = 64  # characters of a token, about
        if tokenizer.joins_bytes:
            self.longest = max(map(len, tokenizer.token_bytes))

    def adapter(self, model: str | None) -> str:
        """The adapter that a request's `model` names; "" is the checkpoint. Raises ApiError."""
        if model is None or model == self.name:
            return ""
        if model and model in self.engine.models:
            return model
        names = ", ".join([self.name, *(n for n in self.engine.models if n)])
        raise ApiError(
            404,
            f"there is no model {model[:80]!r} here: there are {names}",
            param="model",
            code="model_not_found",
        )

    def describe(self, adapter: str) -> dict[str, Any]:
        """A row of /v1/models."""
        lm = self.engine.models[adapter]
        return {
            "id": adapter or self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gptjax",
            "parent": self.name if adapter else None,
            "context_length": self.engine.length,
            "chat": bool(lm.text_tokenizer.chat_template),
        }

    def encode(self, prompt: str | Sequence[int], adapter: str, param: str) -> list[int]:
        """Ids of a prompt that may fit. Raises ApiError, UserError."""
        if isinstance(prompt, str):
            self.check_size(len(prompt), param)
        return self.engine.models[adapter].encode(prompt)

    def check_size(self, characters: int, param: str) -> None:
        """Raises ApiError for a text that is too long to be worth encoding."""
        if characters > 4 * self.longest * (self.engine.length + 1):
            raise self._too_long(f"{characters:,} characters", param)

    def room(self, ids: Sequence[int], param: str) -> int:
        """Tokens that may follow a prompt. Raises ApiError where none may."""
        room = self.engine.length + 1 - len(ids)
        if room < 1:
            raise self._too_long(f"{len(ids):,} tokens", param)
        return room

    def _too_long(self, size: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {size}, and a text here has room for {self.engine.length:,} tokens: "
            "shorten it",
            param=param,
            code="context_length_exceeded",
        )

    def new_tokens(self, asked: int | None, default: int, room: int, param: str) -> int:
        """How many tokens to write: what was asked for, or the default as far as there is room.

        Raises ApiError."""
        if asked is None:
            return min(default, room, self.max_tokens or room)
        if self.max_tokens and asked > self.max_tokens:
            raise ApiError(
                400,
                f"{param} is {asked:,}, and this server writes at most {self.max_tokens:,} tokens",
                param=param,
                code="too_many_tokens",
            )
        if asked > room:
            raise ApiError(
                400,
                f"{param} is {asked:,}, and after this prompt there is room for {room:,} tokens of "
                f"the {self.engine.length:,} that a text may have",
                param=param,
                code="context_length_exceeded",
            )
        return asked

    def options(self, fields: Mapping[str, Any]) -> GenerationOptions:
        """The options that a request's fields ask for. Raises UserError."""
        given: dict[str, Any] = {name: fields[name] for name in _SAME if name in fields}
        for name, option in RENAMED.items():
            if name in fields:
                given[option] = fields[name]
        given |= _constraints(fields)
        seed = fields["seed"] % 2**32 if "seed" in fields else secrets.randbits(32)
        return GenerationOptions(**{"temperature": 1.0, **given, "seed": seed})

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for alone; of a control token its name."""
        if token in self._control:
            return self._control[token]
        return self._tokenizer.decode_bytes([token])


CONSTRAINTS = {  # fields that say what the text must be: the option that each is
    "response_format": "schema",
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "grammar",
}


def _constraints(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the text must be, as options. Raises ApiError where several fields say it."""
    wanted = {name: fields[name] for name in CONSTRAINTS if name in fields}
    shape = wanted.pop("response_format", {"type": "text"})
    if shape["type"] == "json_object":
        wanted["response_format"] = {"type": "object"}
    elif shape["type"] == "json_schema":
        if "json_schema" not in shape:
            name = "response_format.json_schema"
            raise ApiError(400, f"{name} is missing", param=name, code="missing_field")
        wanted["response_format"] = shape["json_schema"]["schema"]
    if len(wanted) > 1:
        raise conflict(wanted)
    return {CONSTRAINTS[name]: value for name, value in wanted.items()}


def conflict(fields: Iterable[str]) -> ApiError:
    """Of fields that each say what the text must be."""
    names = " and ".join(fields)
    return ApiError(400, f"{names}: a text follows one of them", param=names, code="conflict")


def token_text(text: bytes) -> str:
    """As OpenAI's completions write it: half a character is spelt out by its bytes."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    new: int = 0

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
        }
