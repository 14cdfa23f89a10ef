"""Tokens/s of text that follows a grammar, against free text, after the first token.

    python experiments/benchmarks/guided.py --checkpoint=PATH [--weights=int8] [--rounds=5]
        [--new=128] [--batches=1,8]

One process; free text, a regular expression and a JSON schema take turns (A B C A B C ...), and
medians are compared. Sampled at temperature 1, without end tokens, so that all texts are long. A
text's first token is timed apart, by asking for one alone.
"""

from __future__ import annotations

import statistics
import sys
import time

import gptjax
from gptjax.core import cli

PROMPT = "Describe five people of a small town by the sea, one after another, in detail:\n"
PEOPLE = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 40},
            "age": {"type": "integer", "minimum": 1, "maximum": 120},
            "work": {"enum": ["fisher", "baker", "teacher", "keeper of the lighthouse"]},
            "life": {"type": "string", "minLength": 400},
        },
        "required": ["name", "age", "work", "life"],
        "additionalProperties": False,
    },
    "minItems": 5,
}
KINDS = {
    "free text": {},
    "regex": {"regex": r"([A-Z][a-z]*( [a-z]+){3,20}\. )+"},
    "JSON schema": {"schema": PEOPLE},
}


def main(argv: list[str]) -> None:
    names = {"checkpoint": "", "weights": "", "rounds": "", "new": "", "batches": ""}
    args = cli.parse(argv, __doc__, names, required=("checkpoint",))
    lm = gptjax.load(args["checkpoint"], weights=args["weights"] or "int8")
    rounds, new = args.number("rounds", 5), args.number("new", 128)

    def seconds(batch: int, kind: str, count: int, seed: int) -> tuple[float, int]:
        began = time.perf_counter()
        completions = lm.generate(
            [PROMPT] * batch,
            max_new_tokens=count,
            temperature=1.0,
            seed=seed,
            ignore_end=True,
            **KINDS[kind],
        )
        tokens = sum(len(completion.tokens) for completion in completions)
        return time.perf_counter() - began, tokens

    print(
        "| batch | kind | tokens/s after the first token | against free text |\n|---|---|---|---|"
    )
    for batch in map(int, (args["batches"] or "1,8").split(",")):
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(rounds + 1):
            for kind in KINDS:
                first, before = seconds(batch, kind, 1, turn)
                whole, after = seconds(batch, kind, new, turn)
                if turn:  # the first compiles
                    rates[kind].append((after - before) / (whole - first))
        free = statistics.median(rates["free text"])
        for kind, values in rates.items():
            rate = statistics.median(values)
            print(f"| {batch} | {kind} | {rate:.1f} | {rate / free:.2f}x |", flush=True)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
