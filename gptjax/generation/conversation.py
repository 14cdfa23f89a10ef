"""TODO docstring."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.generation.flags import options
from gptjax.generation.language_model import LanguageModel
from gptjax.tokenizer import chat_template

_HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /save FILE writes the conversation as JSON, /exit ends"


def converse(lm: LanguageModel, args: cli.Args) -> None:
    """A conversation: lines from stdin, answers to stdout."""
    chat_template.encode(
        lm.text_tokenizer, [{"role": "user", "content": "hello"}]
    )  # whether it can chat at all
    settings, limit = options(args), args.number("max_new_tokens", 512)
    if settings.pop("num_beams", 1) > 1 or settings.get("overflow") == "slide":
        raise UserError(
            "--chat streams and drops old turns by itself: leave out --num_beams and --rolling"
        )
    system, history = args["system"], list[dict[str, str]]()
    if sys.stdin.isatty():
        cli.say(_HELP)
    for line in _lines():
        if line.startswith("/"):
            verb, _, rest = line.partition(" ")
            if verb in ("/exit", "/quit"):
                return
            if verb == "/reset":
                history.clear()
            elif verb == "/system":
                system = rest
            elif verb == "/save" and rest:
                files.write_text(
                    Path(rest).expanduser(),
                    json.dumps(_messages(system, history), ensure_ascii=False, indent=1),
                )
                cli.say(f"saved {len(history)} messages to {rest}")
            else:
                cli.say(_HELP)
            continue
        history.append({"role": "user", "content": line})
        answer = ""
        for piece in lm.stream(
            _fitting(lm, system, history, limit), max_new_tokens=limit, **settings
        ):
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        history.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _messages(system: str, history: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] * bool(system) + history


def _fitting(
    lm: LanguageModel, system: str, history: list[dict[str, str]], limit: int
) -> list[int]:
    """Ids of the conversation; its oldest turns are dropped, and that is said, where it no longer fits beside the answer."""
    dropped = 0
    while True:
        ids = [lm.text_tokenizer.eot] * lm.prompt_places + chat_template.encode(
            lm.text_tokenizer, _messages(system, history)
        )
        if len(ids) + limit <= lm.config.context + 1:
            break
        if len(history) < 3:
            raise UserError(
                f"this message needs {len(ids)} tokens and {limit} for the answer; the context has {lm.config.context}: shorten it or lower --max_new_tokens"
            )
        del history[:2]
        dropped += 2
    if dropped:
        cli.say(f"(the context is full: the {dropped} oldest messages are forgotten)")
    return ids
