"""What a tokenizer is trained on: a sample spread over all texts, and the characters in it."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator

import numpy as np

LIMIT = 8 << 20  # characters in a sample; texts that have no more are taken whole
_BLOCK = 4096  # characters that are taken or left together
_LONGEST_LINE = 4096  # characters; the trainer drops very long lines
# 2**64 / golden ratio: multiples of it modulo 2**64 are spread evenly over any stretch of numbers,
# so a long text gives its share of blocks, and no period in the order of texts is missed.
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class Sample:
    """Pieces of texts in their order, and how much of what they are.

    characters, texts: in the sample; all_characters, all_texts: in everything.
    """

    pieces: list[str]
    characters: int
    texts: int
    all_characters: int
    all_texts: int

    def __str__(self) -> str:
        texts = "text" if self.all_texts == 1 else "texts"
        if self.characters == self.all_characters:
            return f"all {self.all_characters:,} characters of {self.all_texts:,} {texts}"
        share = f"{self.characters / 1e6:.1f} M of {self.all_characters / 1e6:.1f} M"
        spread = f"{self.texts:,} of" if self.texts < self.all_texts else "all"
        return f"{share} characters, spread over {spread} {self.all_texts:,} {texts}"

    def lines(self, without: str) -> list[str]:
        """The lines, without line ends and this character; long ones in several parts."""
        lines: list[str] = []
        for piece in self.pieces:
            for line in piece.replace(without, "").splitlines():
                for start in range(0, len(line), _LONGEST_LINE):
                    lines.append(line[start : start + _LONGEST_LINE])
        return lines


def sample_texts(texts: Iterable[str], limit: int) -> Sample:
    """At most `limit` characters of the texts, in blocks spread evenly over all of them.

    One pass, memory for `limit` characters; the same texts give the same sample. Empty texts do
    not count. Raises UnicodeEncodeError for half of a UTF-16 pair.
    """
    taken: list[tuple[int, int, int, str]] = []  # (-rank, number of block, of text, block): a heap
    number = characters = all_characters = all_texts = 0
    for text in filter(None, texts):
        text.encode()
        for start in range(0, len(text), _BLOCK):
            block = text[start : start + _BLOCK]
            rank = number * _GOLDEN % (1 << 64)
            heapq.heappush(taken, (-rank, number, all_texts, block))
            number += 1
            characters += len(block)
            while characters > limit:
                characters -= len(heapq.heappop(taken)[-1])
        all_texts += 1
        all_characters += len(text)
    in_order = sorted((number, text, block) for _, number, text, block in taken)
    return Sample(
        list(_join_neighbours(in_order)),
        characters,
        len({text for _, text, _ in in_order}),
        all_characters,
        all_texts,
    )


def _join_neighbours(blocks: list[tuple[int, int, str]]) -> Iterator[str]:
    """Blocks that follow one another in a text, as one piece."""
    parts: list[str] = []
    before = (-1, -1)
    for number, text, block in blocks:
        if parts and (number, text) != (before[0] + 1, before[1]):
            yield "".join(parts)
            parts = []
        parts.append(block)
        before = (number, text)
    if parts:
        yield "".join(parts)


def count_characters(lines: Iterable[str]) -> dict[str, int]:
    """How often each character occurs in the lines; the most frequent first."""
    codes = np.frombuffer("".join(lines).encode("utf-32-le"), np.uint32)
    counts = np.bincount(codes)
    present = np.flatnonzero(counts)
    order = present[np.argsort(-counts[present], kind="stable")]
    return {chr(code): int(counts[code]) for code in order}
