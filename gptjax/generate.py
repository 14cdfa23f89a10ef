"""Text from a model: a workdir, a Hugging Face folder, a .gguf file.

    python -m gptjax.generate --checkpoint=runs/quickstart --prompt="My fellow citizens" [--max_new_tokens=100]
        [--temperature=0.8] [--top_k=0] [--top_p=1.0] [--seed=0] [--num_beams=4] [--stop="."] [--weights=int8] [--rolling]
    python -m gptjax.generate --checkpoint=PATH --chat [--system="You are brief."]

Streams to stdout. --chat is a conversation through the checkpoint's own template; /help in it lists its commands.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # until the first token: looking for garbage takes a tenth of a start, and there is none

from gptjax import chat, cli, files, language_model, metrics
from gptjax.config import UserError
from gptjax.language_model import LanguageModel
from gptjax.sampling import Sampling

FLAGS = {
    "checkpoint": "a workdir, a step's folder in it, a Hugging Face folder or a .gguf file",
    "adapter": "run or PEFT folder whose adapters stand on the checkpoint",
    "prompt": "text to continue; empty = a new document",
    "chat": "a conversation in the terminal",
    "system": "--chat: the system prompt",
    "max_new_tokens": "tokens to make (100, or what the context allows)",
    "temperature": "0 = most likely token (0.8)",
    "top_k": "keep the k most likely tokens; 0 = all",
    "top_p": "keep the most likely tokens up to this probability; 1 = all",
    "min_p": "drop tokens below this share of the best one's probability; 0 = none",
    "typical_p": "locally typical sampling up to this probability; 1 = off",
    "repetition_penalty": "divides the logits of tokens that occurred; 1 = off",
    "presence_penalty": "taken from tokens generated before; 0 = off",
    "frequency_penalty": "taken once for each time; 0 = off",
    "no_repeat_ngram": "no n tokens in a row twice; 0 = off",
    "min_new_tokens": "no end of text before; 0 = off",
    "stop": "end the text before this string",
    "banned": "words that must not occur, with commas between them",
    "num_beams": "beam search; 1 = off",
    "length_penalty": "beam search: exponent of the length (1.0)",
    "speculate": "guesses a pass by prompt lookup, with --temperature=0; 0 = off",
    "n": "completions of the prompt",
    "seed": "same seed, same text (0)",
    "weights": "float32, bfloat16 or int8: smaller is faster",
    "cache_dtype": "of keys and values: float32, bfloat16 or int8; by default the compute dtype",
    "rolling": "go on past the context: whenever it is full, its older half falls out of sight",
}
_NUMBERS = {
    "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "no_repeat_ngram": 0, "min_new_tokens": 0, "seed": 0,
}  # fmt: skip


def options(args: cli.Args) -> dict[str, Any]:
    """The flags as arguments of `LanguageModel.generate`; beam search and speculation are greedy unless a temperature is given."""
    found: dict[str, Any] = {name: args.number(name, default) for name, default in _NUMBERS.items()}
    Sampling(**found)  # refuses what is out of range
    if (limit := args.number("max_new_tokens", 1)) < 1:
        raise UserError(f"--max_new_tokens={limit}: must be at least 1")
    beams, guesses = args.number("num_beams", 1), args.number("speculate", 0)
    if (beams > 1 or guesses) and "temperature" not in args:
        found["temperature"] = 0.0
    if args["stop"]:
        found["stop"] = args["stop"].replace("\\n", "\n").replace("\\t", "\t")
    found["banned"] = [word for word in args["banned"].split(",") if word]
    found["overflow"] = "slide" if "rolling" in args else "refuse"
    if guesses:
        found["speculate_tokens"] = guesses
    if beams > 1:
        found |= {"num_beams": beams, "length_penalty": args.number("length_penalty", 1.0)}
    return found


def new_tokens(lm: LanguageModel, args: cli.Args) -> int:
    """How many tokens to make: as asked, or what the context allows."""
    limit = args.number("max_new_tokens", 100)
    if "max_new_tokens" in args or "rolling" in args:
        return limit
    return max(min(limit, lm.config.context + 1 - len(lm.encode(args["prompt"]))), 1)


def complete(lm: LanguageModel, args: cli.Args) -> None:
    """One prompt, streamed; as JSON, or with several completions, at its end."""
    settings, prompt, n, limit = options(args), args["prompt"], args.number("n", 1), new_tokens(lm, args)
    if "json" in args or n > 1 or settings.get("num_beams"):
        found = lm.generate([prompt], max_new_tokens=limit, n=n, **settings)
        for one in found:
            data = {"prompt": prompt, "text": one.text, "tokens": one.tokens, "logprobs": one.logprobs, "finish_reason": one.finish_reason}
            print(json.dumps(data) if "json" in args else prompt + one.text)
        return
    pieces = lm.stream(prompt, max_new_tokens=limit, **settings)
    echo = prompt
    for piece in pieces:  # the first piece comes after all checks: the prompt is echoed once they passed
        sys.stdout.write(echo + piece)
        sys.stdout.flush()
        echo = ""
    print(echo)


_HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /save FILE writes the conversation as JSON, /exit ends"


def converse(lm: LanguageModel, args: cli.Args) -> None:
    """A conversation: lines from stdin, answers to stdout."""
    chat.encode(lm.text_tokenizer, [{"role": "user", "content": "hello"}])  # whether it can chat at all
    settings, limit = options(args), args.number("max_new_tokens", 512)
    if settings.pop("num_beams", 1) > 1 or settings.get("overflow") == "slide":
        raise UserError("--chat streams and drops old turns by itself: leave out --num_beams and --rolling")
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
                files.write_text(Path(rest).expanduser(), json.dumps(_messages(system, history), ensure_ascii=False, indent=1))
                cli.say(f"saved {len(history)} messages to {rest}")
            else:
                cli.say(_HELP)
            continue
        history.append({"role": "user", "content": line})
        answer = ""
        for piece in lm.stream(_fitting(lm, system, history, limit), max_new_tokens=limit, **settings):
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


def _fitting(lm: LanguageModel, system: str, history: list[dict[str, str]], limit: int) -> list[int]:
    """Ids of the conversation; its oldest turns are dropped, and that is said, where it no longer fits beside the answer."""
    dropped = 0
    while True:
        ids = [lm.text_tokenizer.eot] * lm.prompt_places + chat.encode(lm.text_tokenizer, _messages(system, history))
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


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("checkpoint",))
    settings, n = options(args), args.number("n", 1)  # wrong numbers before the model is read
    metrics.enable_compile_cache()
    with language_model.opening(args["checkpoint"], weights=args["weights"] or "float32", cache_dtype=args["cache_dtype"]) as lm:
        if not (args["adapter"] or "chat" in args or settings.keys() & {"num_beams", "speculate_tokens"}):
            lm.compile(args["prompt"], folder=files.cache_path("programs"), n=n, max_new_tokens=new_tokens(lm, args), **settings)
    if not gc.isenabled():
        gc.freeze()  # what is here now stays
        gc.enable()
    if args["adapter"]:
        lm = lm.adapted(args["adapter"])
    if "chat" in args:
        converse(lm, args)
    else:
        complete(lm, args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
