"""The flags of `gptjax.generate`: their help, and what they mean as `GenerationOptions`.

Each number in `Sampling` is a flag by itself, with its meaning as the help text. To add a flag for
another option, add it to `FLAGS` and to `read_options`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.core.characters import check_characters
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.options import GenerationOptions
from gptjax.generation.sampling import NUMBERS

MAX_NEW_TOKENS = 100
CHAT_MAX_NEW_TOKENS = 512

# defaults of the flags of numbers: those of the options, but a temperature that gives lively text
_DEFAULTS = {**NUMBERS, "temperature": 0.8}
_MEANINGS = {
    field.name: field.metadata["meaning"] for field in dataclasses.fields(GenerationOptions)
}

_TEXTS = (
    "prompt",
    "system",
    "stop",
    "banned",
    "regex",
    "choices",
)  # flags that hold text, not numbers or paths

FLAGS = {
    "checkpoint": "a workdir, a step's folder in it, a Hugging Face folder or a .gguf file",
    "adapter": "run or PEFT folder whose adapters are put on the checkpoint",
    "prompt": "text to continue; empty = a new document",
    "chat": "a conversation in the terminal",
    "system": "--chat: the system prompt",
    "chat_template": "--chat: a template by its name, where the checkpoint brings several",
    "max_new_tokens": (
        f"tokens to make ({MAX_NEW_TOKENS}, --chat: {CHAT_MAX_NEW_TOKENS}; or what the context "
        "allows)"
    ),
    **{name: _MEANINGS[name] for name in _DEFAULTS},
    "temperature": f"{_MEANINGS['temperature']} ({_DEFAULTS['temperature']})",
    "stop": _MEANINGS["stop"],
    "banned": "words that must not occur, with commas between them",
    "json_schema": "a file with a JSON schema: the text is JSON by it (extra [guide])",
    "regex": _MEANINGS["regex"],
    "choices": f"{_MEANINGS['choices']}, with commas between them",
    "grammar": "a file with a context-free grammar in Lark that the text follows",
    "num_beams": _MEANINGS["num_beams"],
    "length_penalty": f"{_MEANINGS['length_penalty']} (1.0)",
    "num_speculative_tokens": _MEANINGS["num_speculative_tokens"],
    "n": _MEANINGS["n"],
    "weights": "float32, bfloat16 or int8: smaller is faster",
    "cache_dtype": "of keys and values: float32, bfloat16 or int8; by default the compute dtype",
    "mesh": "devices, such as tensor=4,data=2: heads and vocabulary over tensor, texts over data",
    "context_shift": "go on past the context: when it is full, its older half falls out of sight",
}


def read_options(args: cli.Args) -> GenerationOptions:
    """The flags as options; `max_new_tokens` is its flag's value or a placeholder (`new_tokens`).

    Beam search and speculation are greedy unless a temperature is given. Raises UserError.
    """
    for name in _TEXTS:
        check_characters(args[name], f"--{name}")
    options: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        options[name] = args.number(name, default)
    options["max_new_tokens"] = args.number("max_new_tokens", MAX_NEW_TOKENS)
    for name, default in (("n", 1), ("num_beams", 1), ("num_speculative_tokens", 0)):
        options[name] = args.number(name, default)
    options["num_beams"] = max(options["num_beams"], 1)  # 0 is off, too
    options["length_penalty"] = args.number("length_penalty", 1.0)
    greedy = options["num_beams"] > 1 or options["num_speculative_tokens"]
    if greedy and "temperature" not in args:
        options["temperature"] = 0.0
    if args["stop"]:
        options["stop"] = args["stop"].replace("\\n", "\n").replace("\\t", "\t")
    options["banned"] = [word for word in args["banned"].split(",") if word]
    for flag, name in (("json_schema", "schema"), ("grammar", "grammar")):
        if args[flag]:
            options[name] = _read(args[flag], flag)
    if args["regex"]:
        options["regex"] = args["regex"]
    if args["choices"]:
        options["choices"] = args["choices"].split(",")
    options["overflow"] = "slide" if "context_shift" in args else "refuse"
    return GenerationOptions(**options)


def _read(path: str, flag: str) -> str:
    """The text of a file. Raises UserError."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag}={path}: {error}") from None


def new_tokens(lm: LanguageModel, args: cli.Args) -> int:
    """How many tokens to make: as many as asked for, or what the context allows."""
    limit = args.number("max_new_tokens", MAX_NEW_TOKENS)
    if "max_new_tokens" in args or "context_shift" in args:
        return limit
    return max(min(limit, lm.config.context + 1 - len(lm.encode(args["prompt"]))), 1)
