"""Conversations through the checkpoint's own chat template, run in a sandbox.

In: messages. Out: token ids. A template may write control tokens, and people may not: where a
message spells the name of one, a guard character inside the name keeps it text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.config.errors import UserError, unknown_name
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.messages import (
    REASONING,
    Message,
    Words,
    read_messages,
    read_tools,
    texts_in,
)

log = logging.getLogger("gptjax")

SECONDS = 5  # a template that runs longer is hostile or broken


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of the filled template, as transformers' `apply_chat_template` gives it.

    variables: `bos_token`, `tools`, ... Raises UserError where the template fails, refuses the
    conversation or runs for longer than SECONDS.
    """
    import jinja2

    values = {
        "tools": None,
        "documents": None,
        **variables,
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with _time_limit():
            return _compile(template).render(**values)
    except UserError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the checkpoint's chat template is no Jinja template: line {error.lineno}: "
            f"{str(error)[:150]}"
        ) from None
    except Exception as error:  # a template can raise nearly anything
        raise UserError(
            "the checkpoint's chat template does not run: "
            f"{type(error).__name__}: {str(error)[:150]}"
        ) from None


@functools.lru_cache(8)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@functools.lru_cache(1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; its body is written as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def format_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = format_now
    return environment


@functools.lru_cache(8)
def words_of(template: str) -> Words:
    """What the template reads, by its source. Of one that is no Jinja: nothing."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = _environment().parse(template)
    except jinja2.TemplateSyntaxError:  # `render` says so
        return Words(frozenset(), frozenset())
    variables = {node.name for node in tree.find_all(nodes.Name)}
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    messages = {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name)
        and isinstance(loop.iter, nodes.Name)
        and loop.iter.name not in ("tools", "documents")
    }
    whole = [
        node.name == "tojson" and isinstance(node.node, nodes.Name) and node.node.name in messages
        for node in tree.find_all(nodes.Filter)
    ]
    return Words(frozenset(variables), frozenset(names), any(whole))


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


def plain_template(tokenizer: Tokenizer) -> str:
    """A template for a checkpoint that was never tuned for dialogue.

    Each message is a line `User:` or `Assistant:`, its text, and the end token, which no message
    can write. Raises UserError where the vocabulary has no name for that token.
    """
    names = {i: name for name, i in tokenizer.control.items()}
    if not names.keys() >= {tokenizer.eos_ids[0], *tokenizer.bos_ids}:
        raise UserError(
            "the vocabulary has no name for its first or end token, so no chat template can write "
            "it: take a checkpoint with a template"
        )
    bos = "".join(names[i] for i in tokenizer.bos_ids)
    eos = names[tokenizer.eos_ids[0]]
    message = "{{ message.role | capitalize }}:\n{{ message.content or '' }}" + eos
    messages = "{% for message in messages %}" + message + "{% endfor %}"
    return bos + messages + "{% if add_generation_prompt %}Assistant:\n{% endif %}"


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's answer.

    Raises UserError for a model without a template or a malformed message.
    """
    talk = _prepare(tokenizer, messages, variables)
    text = talk.render(len(talk.messages), add_generation_prompt=add_generation_prompt)
    return tokenizer.encode_template(text, talk.guard)


class Span(NamedTuple):
    """Ids of a conversation, and whether the assistant is to learn them."""

    ids: list[int]
    learned: bool


class Text(NamedTuple):
    """What is learned as one text. answers: numbers of the messages that are learned in it."""

    spans: list[Span]
    answers: list[int]


def split_texts(tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[Text]:
    """A conversation as texts to learn from: one, or several where the template rewrites.

    The assistant learns what it writes after the prompt for its answer, with the end token that
    closes it, but for messages of weight 0. The spans are found by filling the template turn by
    turn, never by searching its text. A template may write a turn differently once others follow
    (Qwen3 leaves the thinking out): then a new text begins, so that each answer is learned after
    the prompt that generation would give it. Texts without a learned answer are left out.
    Raises UserError where an answer is empty or has no end.
    """
    talk = _prepare(tokenizer, messages, variables)
    texts: list[Text] = []
    done, done_ids = "", list[int]()  # the text through the last answer
    for i, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        before = talk.render(i, add_generation_prompt=True)
        after = talk.render(i + 1, add_generation_prompt=False)
        if not after.startswith(before):
            after = before + _write_answer(tokenizer, talk.template, message)
        if not texts or not before.startswith(done):
            texts.append(Text([], []))
            done, done_ids = "", []
        before_ids = tokenizer.encode_template(before, talk.guard)
        after_ids = tokenizer.encode_template(after, talk.guard)
        answer = _ids_after(before_ids, after_ids)
        if not answer:
            answer = tokenizer.encode_template(after[len(before) :], talk.guard)
        question = _ids_after(done_ids, before_ids)
        if not question:
            question = tokenizer.encode_template(before[len(done) :], talk.guard)
        learned = talk.weights[i] == 1
        end = _end_of_answer(tokenizer, answer, i) if learned else len(answer)
        texts[-1].spans.extend(
            [Span(question, False), Span(answer[:end], learned), Span(answer[end:], False)]
        )
        if learned:
            texts[-1].answers.append(i)
        done, done_ids = after, after_ids
    return [
        Text([span for span in text.spans if span.ids], text.answers)
        for text in texts
        if text.answers
    ]


def _write_answer(tokenizer: Tokenizer, template: str, message: Message) -> str:
    """An answer as a model writes it after a prompt that opens its reasoning (DeepSeek-R1).

    Such a template writes `<think>` in the prompt for an answer, and leaves the reasoning out of
    the answers that it is given. Raises UserError for any other template.
    """
    special = tuple(tokenizer.special.items())
    tag, end = _opens_reasoning(template, special), _after_answer(template, special)
    content = message.get("content")
    if not tag or not end or not isinstance(content, str) or "tool_calls" in message:
        raise UserError(
            "the chat template writes an answer otherwise than after its own prompt for one, so "
            "what the assistant said cannot be told from the rest: simplify the template"
        )
    if f"</{tag}>" in content:
        return content.strip().removeprefix(f"<{tag}>").lstrip("\n") + end
    reasoning = next((message[key] for key in REASONING if key in message), "")
    return f"{reasoning}\n</{tag}>\n\n{content}{end}"


@functools.lru_cache(8)
def _opens_reasoning(template: str, special: tuple[tuple[str, str], ...]) -> str:
    """ "think" where the prompt for an answer ends in <think>; else ""."""
    question = [{"role": "user", "content": "question"}]
    try:
        text = render(template, question, add_generation_prompt=True, **dict(special))
    except UserError:  # what it refuses is said where a conversation is rendered
        return ""
    opening = re.search(r"<(\w+)>\s*\Z", text)
    return opening[1] if opening else ""


def _ids_after(beginning: list[int], ids: list[int]) -> list[int]:
    """The ids after those of the beginning; nothing where a token spans the border."""
    return ids[len(beginning) :] if ids[: len(beginning)] == beginning else []


def _end_of_answer(tokenizer: Tokenizer, answer: list[int], number: int) -> int:
    """How many ids the assistant is to learn: through the first end token. Raises UserError."""
    stops = end_ids(tokenizer)
    ends = [k for k, token in enumerate(answer) if token in stops]
    if not ends:
        raise UserError(
            "the chat template closes no answer with an end token, so a model could not learn to "
            "stop: use a template that does"
        )
    if not tokenizer.decode_bytes(answer[: ends[0]]).strip():
        raise UserError(
            f"message {number} of the assistant is empty: there is nothing to learn from"
        )
    return ends[0] + 1


_MARK = "\ufdd2answer\ufdd2"  # noncharacters: no template writes them


@functools.lru_cache(8)
def _after_answer(template: str, special: tuple[tuple[str, str], ...]) -> str:
    """What the template writes after an answer; nothing where it refuses the simplest question."""
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = render(template, talk, add_generation_prompt=False, **dict(special))
    except UserError as error:
        log.debug("the end of an answer is not known from the chat template: %s", error)
        return ""
    _, mark, rest = text.rpartition(_MARK)
    return rest if mark else ""


def answer_end(tokenizer: Tokenizer) -> int:
    """The id that closes an answer: the first control token that the template writes after one."""
    if tokenizer.chat_template:
        after = _after_answer(tokenizer.chat_template, tuple(tokenizer.special.items()))
        names = [*tokenizer.control, *tokenizer.special.values()]
        places = {after.find(name): name for name in names if name and name in after}
        if places:
            ids = tokenizer.encode_template(places[min(places)])
            if len(ids) == 1:
                return ids[0]
    return tokenizer.eos_ids[0]


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a generated text: those of the checkpoint's config and, where it has a chat
    template, the one that closes an answer there and the tokenizer's own end of text.
    """
    ids = list(tokenizer.eos_ids)
    if tokenizer.chat_template:
        ids.append(answer_end(tokenizer))
        own = tokenizer.control.get(tokenizer.special.get("eos_token", ""))
        ids += [] if own is None else [own]
    return tuple(dict.fromkeys(ids))


def choose(tokenizer: Tokenizer, name: str) -> None:
    """Makes the template of that name the tokenizer's. Raises UserError where there is none."""
    if name in tokenizer.templates:
        tokenizer.chat_template = tokenizer.templates[name]
        return
    if tokenizer.templates:
        raise UserError(unknown_name("chat template", name, list(tokenizer.templates)))
    raise UserError(f"no chat template {name!r}: the checkpoint brings none; leave the name out")


def _template(tokenizer: Tokenizer, tools: Any) -> str:
    """The template that is filled. Raises UserError where there is none."""
    if template := tokenizer.template_for(tools):
        return template
    if tokenizer.templates:
        raise UserError(
            f"the checkpoint's chat templates are named {', '.join(tokenizer.templates)}, and none "
            "is named 'default': choose one with --chat_template=NAME (task.chat_template in a "
            "config)"
        )
    raise UserError(
        "this checkpoint has no chat template, so it is no chat model: use --prompt, or a "
        "checkpoint tuned for dialogue"
    )


class _Conversation(NamedTuple):
    """What a template is filled with. weights: of each message, 0 where it is not learned.
    guard: what keeps names of control tokens text.
    """

    template: str
    messages: list[dict[str, Any]]
    weights: list[int]
    variables: dict[str, Any]
    guard: str

    def render(self, count: int, *, add_generation_prompt: bool) -> str:
        """The first `count` messages."""
        return render(
            self.template,
            self.messages[:count],
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )


def _prepare(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> _Conversation:
    variables = {name: value for name, value in variables.items() if value is not None}
    if "tools" in variables:
        variables["tools"] = read_tools(variables["tools"])
    template = _template(tokenizer, variables.get("tools"))
    words = words_of(template)
    for name, value in variables.items():
        if value not in ([], {}, "") and name not in words.variables:
            raise UserError(
                f"the chat template does not read {name!r}, so it would be lost: take a checkpoint "
                "whose template does, or leave it out"
            )
    if _opens_reasoning(template, tuple(tokenizer.special.items())):
        words = dataclasses.replace(words, names=words.names | set(REASONING))  # `_write_answer`
    read = read_messages(messages, words)
    weights = [message.pop("weight", 1) for message in read]
    names = [name for name in tokenizer.control if name]
    values: dict[str, Any] = {"messages": read, **variables}
    texts = list(texts_in(values))
    guard = ""
    if any(_contains_any(text, names) for text in texts):
        guard = _free_character(texts)
        values = _guarded(values, names, guard)
    filled = values.pop("messages")
    talk = _Conversation(template, filled, weights, {**tokenizer.special, **values}, guard)
    _check_nothing_left_out(talk)
    return talk


def _check_nothing_left_out(talk: _Conversation) -> None:
    """Raises UserError where the template writes nothing of a message (Phi-3: of a tool's)."""
    marks, marked = {}, []
    for i, message in enumerate(talk.messages):
        if isinstance(message.get("content"), str) and message["content"].strip():
            marks[i] = f"{_MARK[0]}{i}{_MARK[0]}"
            message = {**message, "content": message["content"] + marks[i]}
        marked.append(message)
    try:
        text = talk._replace(messages=marked).render(len(marked), add_generation_prompt=False)
    except UserError:  # said where the messages themselves are rendered
        return
    for i, mark in marks.items():
        if mark not in text:
            raise UserError(
                f"the chat template leaves out message {i} (of role {marked[i]['role']!r}), so it "
                "would be lost: take a checkpoint whose template writes it, or drop the message"
            )


def _contains_any(text: str, names: Sequence[str]) -> bool:
    return any(name in text for name in names)


def _free_character(texts: Sequence[str]) -> str:
    """A character that occurs in none of the texts. Raises UserError where there is none."""
    for code in range(0xFDD0, 0xFDF0):  # Unicode's noncharacters: no text needs them
        if not any(chr(code) in text for text in texts):
            return chr(code)
    raise UserError(
        "the conversation holds names of control tokens and all 32 of Unicode's noncharacters "
        "from U+FDD0: take one of them out"
    )


def _guarded(value: Any, names: Sequence[str], guard: str) -> Any:
    """The value with `guard` after the first character of each control token's name in a text."""
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            value = value.replace(name, name[0] + guard + name[1:])
        return value
    if isinstance(value, Mapping):
        guarded = {}
        for key, item in value.items():
            guarded[_guarded(key, names, guard)] = _guarded(item, names, guard)
        return guarded
    if isinstance(value, list | tuple):
        return [_guarded(item, names, guard) for item in value]
    return value
