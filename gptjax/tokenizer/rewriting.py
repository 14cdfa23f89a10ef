"""A `tokenizer.json` of Hugging Face, made of vocabularies that other formats hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SPACE = "\u2581"  # how pieces write a space

# types of sentencepiece's pieces, as its model files and GGUF number them
TEXT, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level_json(
    vocabulary: dict[str, int],
    merges: Sequence[str],
    *,
    control: Sequence[str],
    digits: bool,
    pattern: str = "",
    bos: int = -1,
    uncut: Sequence[str] = (),
    nfc: bool = False,
    prefix_space: bool = False,
) -> bytes:
    """A `tokenizer.json` of byte-level BPE.

    control: tokens that text never becomes. digits: whether each digit is a token. pattern: the
    rule that cuts text, where it is not GPT-2's. bos: id before every text; -1 = none. uncut:
    tokens that are never cut. nfc: whether characters are composed first. prefix_space: whether
    a space is written before every text.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        pairs.append((first, second))
    result = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    if nfc:
        result.normalizer = normalizers.NFC()
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern:
        cuts.append(pre_tokenizers.Split(Regex(pattern), "isolated", invert=False))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not pattern))
    result.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    result.decoder = decoders.ByteLevel()

    def added(names: Sequence[str], *, special: bool) -> list[AddedToken]:
        return [
            AddedToken(name, special=special, normalized=False)
            for name in names
            if name in vocabulary
        ]

    result.add_special_tokens(added(control, special=True))
    result.add_tokens(added(uncut, special=False))
    name = next((name for name, i in vocabulary.items() if i == bos), "")
    return _with_bos(result, name, bos)


def pieces_json(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, bos: int
) -> bytes:
    """A `tokenizer.json` of sentencepiece-like BPE with byte fallback.

    types: TEXT, UNKNOWN, ... of each piece. Sentencepiece merges the pair whose union has the best
    score: each way to cut a piece into two known ones is such a merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {piece: i for i, piece in enumerate(pieces)}
    texts = [i for i, kind in enumerate(types) if kind == TEXT]
    merges: list[tuple[str, str]] = []
    for i in sorted(texts, key=lambda i: -scores[i]):
        merges += _cuts(pieces[i], ids)
    unknown = next((p for p, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    result = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    result.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    result.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    control = [
        piece for piece, kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL)
    ]
    result.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    return _with_bos(result, pieces[bos] if bos >= 0 else "", bos)


def _cuts(piece: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The ways to cut a piece into two known ones, in the order of their ids."""
    cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
    known = [(first, second) for first, second in cuts if first in ids and second in ids]
    return sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))


def _with_bos(result: Any, name: str, bos: int) -> bytes:
    """The tokenizer's JSON, with the token `name` before every text where there is one."""
    if name:
        from tokenizers import processors

        result.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=None, special_tokens=[(name, bos)]
        )
    return result.to_str().encode()
