"""Conversations through the checkpoint's own template, run in a sandbox.

A template may write control tokens; what people say may not: where a message spells the name of one, a guard character keeps it text.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer.base import Tokenizer

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | ..., "content": text}


SECONDS = 5  # a template that runs longer is hostile or broken


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The template's text, as transformers' `apply_chat_template` gives it. variables: `bos_token`, `tools`, ... Raises UserError."""
    values = {
        "tools": None,
        "documents": None,
        **variables,
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with _time_limit():
            return _compiled(template).render(**values)
    except UserError:
        raise
    except Exception as error:  # a template can raise nearly anything
        raise UserError(
            f"the checkpoint's chat template does not run: {type(error).__name__}: {str(error)[:150]}"
        ) from None


@functools.lru_cache(8)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; the text is that of its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **kw: json.dumps(
        x, ensure_ascii=ensure_ascii, **kw
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Ends the block with a UserError after `SECONDS`; in the main thread, where Python can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise UserError(f"the checkpoint's chat template ran for {SECONDS} s and was stopped")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plain(tokenizer: Tokenizer) -> str:
    """A template for a checkpoint that was never tuned for dialogue: a line `User:` or `Assistant:`, the text, and the end token, which no message
    can write. Raises UserError where the vocabulary has no name for that token."""
    names = {i: name for name, i in tokenizer.control.items()}
    if not names.keys() >= {tokenizer.ends[0], *tokenizer.prefix}:
        raise UserError(
            "the vocabulary has no name for its first or end token, so no chat template can write it: take a checkpoint with a template"
        )
    turn = (
        "{{ message.role | capitalize }}:\n{{ message.content or '' }}" + names[tokenizer.ends[0]]
    )
    begin = "".join(names[i] for i in tokenizer.prefix)
    return (
        begin
        + "{% for message in messages %}"
        + turn
        + "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
    )


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's answer. Raises UserError for a model without a template or a malformed message."""
    given, guard = _prepare(tokenizer, messages, variables)
    return tokenizer.encode_template(_text(tokenizer, given, add_generation_prompt), guard)


def turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """Ids of a conversation in spans, each with whether the assistant is to learn it: what it writes after the prompt for its answer, up to the
    end token that closes it. Found by filling the template turn by turn, never by searching its text. Raises UserError."""
    given, guard = _prepare(tokenizer, messages, {})
    whole, spans = given["messages"], list[tuple[list[int], bool]]()
    done, done_ids = "", list[int]()
    for i, message in enumerate(whole):
        if message["role"] != "assistant":
            continue
        before = _text(tokenizer, {**given, "messages": whole[:i]}, True)
        after = _text(tokenizer, {**given, "messages": whole[: i + 1]}, False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                "the chat template rewrites earlier turns, so what the assistant said cannot be told from the rest: simplify the template"
            )
        before_ids, after_ids = (tokenizer.encode_template(text, guard) for text in (before, after))
        answer = _behind(before_ids, after_ids) or tokenizer.encode_template(
            after[len(before) :], guard
        )
        ends = [k for k, token in enumerate(answer) if token in tokenizer.ends]
        if not ends:
            raise UserError(
                "the chat template closes no answer with an end token, so a model could not learn to stop: use a template that does"
            )
        if not tokenizer.decode_bytes(answer[: ends[0]]).strip():
            raise UserError(
                f"message {i} of the assistant is empty: there is nothing to learn from"
            )
        asked = _behind(done_ids, before_ids) or tokenizer.encode_template(
            before[len(done) :], guard
        )
        spans += [(asked, False), (answer[: ends[0] + 1], True), (answer[ends[0] + 1 :], False)]
        done, done_ids = after, after_ids
    return [span for span in spans if span[0]]


def _behind(begun: list[int], whole: list[int]) -> list[int]:
    """The ids of a conversation behind those that it had before, as it is encoded when it goes on; nothing where a token spans the seam."""
    return whole[len(begun) :] if whole[: len(begun)] == begun else []


def _prepare(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """(what the template is filled with, the guard that keeps names of control tokens in it text)."""
    if not tokenizer.chat_template:
        raise UserError(
            "this checkpoint has no chat template, so it is no chat model: use --prompt, or a checkpoint tuned for dialogue"
        )
    for i, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or "role" not in message
            or not isinstance(message.get("content", ""), str | list | None)
        ):
            raise UserError(
                f"message {i} is {str(message)[:80]!r}: each message is {{'role': ..., 'content': ...}}"
            )
    names, guard = [name for name in tokenizer.control if name], ""
    given: dict[str, Any] = {"messages": list(messages), **variables}
    texts = list(_texts(given))
    if any(name in text for name in names for text in texts):
        free = (
            chr(c) for c in range(0xFDD0, 0xFDF0) if not any(chr(c) in text for text in texts)
        )  # noncharacters: no text needs them
        guard = next(free, "")
        if not guard:
            raise UserError(
                "the conversation holds names of control tokens and all 32 of Unicode's noncharacters from U+FDD0: take one of them out"
            )
        given = _guarded(given, names, guard)
    return {**tokenizer.special, **given}, guard


def _text(tokenizer: Tokenizer, given: Mapping[str, Any], add_generation_prompt: bool) -> str:
    rest = {name: value for name, value in given.items() if name != "messages"}
    return render(
        tokenizer.chat_template,
        given["messages"],
        add_generation_prompt=add_generation_prompt,
        **rest,
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _guarded(value: Any, names: Sequence[str], guard: str) -> Any:
    """Every text in the messages with `guard` behind the first character of each control token's name."""
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            value = value.replace(name, name[0] + guard + name[1:])
        return value
    if isinstance(value, Mapping):
        return {
            _guarded(key, names, guard): _guarded(item, names, guard) for key, item in value.items()
        }
    return (
        [_guarded(item, names, guard) for item in value]
        if isinstance(value, list | tuple)
        else value
    )
