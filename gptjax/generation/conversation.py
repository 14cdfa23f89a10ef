"""`gptjax.generate --chat`: a conversation in the terminal.

Lines from stdin, answers to stdout as they come; help and notes go to stderr. Messages reach the
model through the checkpoint's own chat template. Commands begin with a slash (`/help` lists them).
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.errors import UserError, unknown_name
from gptjax.core import cli, files
from gptjax.core.characters import check_characters
from gptjax.generation.flags import CHAT_MAX_NEW_TOKENS, read_options
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.options import GenerationOptions
from gptjax.tokenizer import chat_template

Message = dict[str, str]

_COMMANDS = ("/reset", "/system", "/save", "/exit", "/quit", "/help")
_HELP = (
    "/reset forgets the conversation, /system TEXT sets the system prompt, "
    "/save FILE writes the conversation as JSON, /exit ends"
)


@dataclasses.dataclass
class Conversation:
    """What was said so far: the system prompt ("" = none), and user and assistant in turns."""

    system: str
    turns: list[Message] = dataclasses.field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All messages as a chat template takes them."""
        if not self.system:
            return self.turns
        return [{"role": "system", "content": self.system}, *self.turns]


def converse(lm: LanguageModel, args: cli.Args) -> None:
    """Answers each line of stdin until its end or `/exit`. Raises UserError before the first.

    A line that cannot be answered is said, and the conversation goes on as it was; only a script
    whose messages were all refused ends with an error.
    """
    if sys.stdin is None:
        raise UserError("--chat reads messages from stdin, which is closed: use --prompt")
    options = read_options(args)
    if options.num_beams > 1 or options.context_shift:
        raise UserError(
            "--chat streams and drops old turns by itself: leave out --num_beams and "
            "--context_shift"
        )
    options = dataclasses.replace(options, n=1)
    limit = options.max_new_tokens if "max_new_tokens" in args else 0
    conversation = Conversation(args["system"])
    _check_template(lm, conversation)  # fails at once where the checkpoint cannot chat
    if sys.stdin.isatty():
        cli.say(_HELP)
    refused = answered = 0
    for line in _lines():
        is_command = line.startswith("/")
        try:
            check_characters(line, "this line")
            if not is_command:
                _answer(lm, conversation, line, options, limit)
            elif not _obey(line, lm, conversation):
                break
            answered += not is_command
        except UserError as error:
            cli.say(f"({error})")
            refused += not is_command
    if refused and not answered and not sys.stdin.isatty():
        raise UserError("none of the messages on stdin could be answered")


def _check_template(lm: LanguageModel, conversation: Conversation) -> None:
    """Raises UserError where the template refuses a first message after the system prompt."""
    first = Conversation(conversation.system, [{"role": "user", "content": "hello"}])
    chat_template.encode(lm.text_tokenizer, first.messages)


def _lines() -> Iterator[str]:
    """The lines of stdin that are not blank. Bytes that are no UTF-8 are kept for a message."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _obey(line: str, lm: LanguageModel, conversation: Conversation) -> bool:
    """Carries out a command; False ends the conversation. Raises UserError for a wrong one."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        conversation.turns.clear()
    elif command == "/system":
        _check_template(lm, Conversation(rest))
        conversation.system = rest
    elif command == "/save" and rest:
        _save(conversation, rest)
        cli.say(f"saved {len(conversation.turns)} messages to {rest}")
    elif command == "/help":
        cli.say(_HELP)
    elif command in _COMMANDS:
        raise UserError(f"{command} needs more: {_HELP}")
    else:
        raise UserError(
            f"{unknown_name('command', command, list(_COMMANDS))}; a space before the slash makes "
            f"it a message.\n{_HELP}"
        )
    return True


def _save(conversation: Conversation, name: str) -> None:
    text = json.dumps(conversation.messages, ensure_ascii=False, indent=1)
    try:
        path = Path(name).expanduser()
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")  # a device or a link stays one
        else:
            files.write_text(path, text)
    except (OSError, ValueError, RuntimeError) as error:  # no such place, no such user, a NUL
        raise UserError(f"not saved: {name!r}: {error}") from None


def _answer(
    lm: LanguageModel,
    conversation: Conversation,
    line: str,
    options: GenerationOptions,
    limit: int,
) -> None:
    """Adds the user's line and the model's answer, which is printed as it comes.

    Ctrl-C ends the answer, not the conversation. Raises UserError, with nothing added or dropped.
    """
    message = {"role": "user", "content": line}
    ids, dropped, space = _fit_ids(lm, conversation, message, limit)
    if dropped:
        del conversation.turns[:dropped]
        cli.say(f"(the context is full: the {dropped} oldest messages are forgotten)")
    answer = ""
    try:
        for piece in lm.stream(ids, dataclasses.replace(options, max_new_tokens=space)):
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        outcome = "what was answered so far is kept" if answer else "the message is taken back"
        cli.say(f"\n(stopped: {outcome}; Ctrl-C once more ends)")
        if not answer:
            return
    print()
    conversation.turns += [message, {"role": "assistant", "content": answer}]


def _fit_ids(
    lm: LanguageModel, conversation: Conversation, message: Message, limit: int
) -> tuple[list[int], int, int]:
    """(ids of the conversation with the message, how many of its oldest turns they leave out so
    that an answer fits the context, tokens of that answer).

    limit: tokens of the answer; 0 = what the context allows, up to CHAT_MAX_NEW_TOKENS, and at
    least a quarter of it. Raises UserError where the message alone is too long.
    """
    context = lm.config.context
    least = limit or min(CHAT_MAX_NEW_TOKENS, max(context // 4, 1))
    for dropped in range(0, len(conversation.turns) + 1, 2):
        turns = [*conversation.turns[dropped:], message]
        messages = Conversation(conversation.system, turns).messages
        ids = chat_template.encode(lm.text_tokenizer, messages)
        ids = [lm.text_tokenizer.eot] * lm.prompt_tokens + ids
        space = context + 1 - len(ids)
        if least <= space:
            return ids, dropped, limit or min(CHAT_MAX_NEW_TOKENS, space)
    ways = "shorten it or lower --max_new_tokens" if limit else "shorten it"
    if conversation.system:
        ways += ", or the system prompt (/system TEXT)"
    raise UserError(
        f"this message needs {len(ids)} tokens and {least} for the answer; the context has "
        f"{context}: {ways}. The conversation goes on without it"
    )
