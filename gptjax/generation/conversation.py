"""`gptjax.generate --chat`: a conversation in the terminal.

Lines from stdin, answers to stdout as they come; help and notes go to stderr. Messages reach the
model through the checkpoint's own chat template. Commands begin with a slash (`/help` lists them).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.generation.flags import CHAT_MAX_NEW_TOKENS, read_options
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.options import GenerationOptions
from gptjax.tokenizer import chat_template

_HELP = (
    "/reset forgets the conversation, /system TEXT sets the system prompt, "
    "/save FILE writes the conversation as JSON, /exit ends"
)


@dataclasses.dataclass
class Conversation:
    """What was said so far: the system prompt ("" = none), and user and assistant in turns."""

    system: str
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages as a chat template takes them."""
        if not self.system:
            return self.turns
        return [{"role": "system", "content": self.system}, *self.turns]


def converse(lm: LanguageModel, args: cli.Args) -> None:
    """Answers each line of stdin until its end or `/exit`. Raises UserError."""
    chat_template.encode(  # fails at once where the checkpoint cannot chat
        lm.text_tokenizer, [{"role": "user", "content": "hello"}]
    )
    options = read_options(args)
    if options.num_beams > 1 or options.context_shift:
        raise UserError(
            "--chat streams and drops old turns by itself: leave out --num_beams and "
            "--context_shift"
        )
    limit = args.number("max_new_tokens", CHAT_MAX_NEW_TOKENS)
    options = dataclasses.replace(options, n=1, max_new_tokens=limit)
    conversation = Conversation(args["system"])
    if sys.stdin.isatty():
        cli.say(_HELP)
    for line in _lines():
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
        else:
            _answer(lm, conversation, line, options)


def _lines() -> Iterator[str]:
    """The lines of stdin that are not blank."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _obey(line: str, conversation: Conversation) -> bool:
    """Carries out a command; False ends the conversation."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        conversation.turns.clear()
    elif command == "/system":
        conversation.system = rest
    elif command == "/save" and rest:
        text = json.dumps(conversation.messages, ensure_ascii=False, indent=1)
        files.write_text(Path(rest).expanduser(), text)
        cli.say(f"saved {len(conversation.turns)} messages to {rest}")
    else:
        cli.say(_HELP)
    return True


def _answer(
    lm: LanguageModel, conversation: Conversation, line: str, options: GenerationOptions
) -> None:
    """Adds the user's line and the model's answer, which is printed as it comes."""
    conversation.add("user", line)
    answer = ""
    for piece in lm.stream(_fit_ids(lm, conversation, options.max_new_tokens), options):
        answer += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    conversation.add("assistant", answer)


def _fit_ids(lm: LanguageModel, conversation: Conversation, limit: int) -> list[int]:
    """Ids of the conversation, with space for an answer of `limit` tokens.

    The oldest turns are dropped, and that is said, until both fit the context. Raises UserError
    where the last message alone is too long.
    """
    dropped = 0
    while True:
        ids = chat_template.encode(lm.text_tokenizer, conversation.messages)
        ids = [lm.text_tokenizer.eot] * lm.prompt_tokens + ids
        if len(ids) + limit <= lm.config.context + 1:
            break
        if len(conversation.turns) < 3:
            raise UserError(
                f"this message needs {len(ids)} tokens and {limit} for the answer; the context has "
                f"{lm.config.context}: shorten it or lower --max_new_tokens"
            )
        del conversation.turns[:2]
        dropped += 2
    if dropped:
        cli.say(f"(the context is full: the {dropped} oldest messages are forgotten)")
    return ids
