"""TODO docstring."""

from __future__ import annotations

from typing import Any

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.sampling import Sampling

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
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram": 0,
    "min_new_tokens": 0,
    "seed": 0,
}


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
