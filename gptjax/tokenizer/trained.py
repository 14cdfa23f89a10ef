"""Tokenizers without files from elsewhere: bytes, characters, and a BPE trained on a run's text."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.tokenizer.base import END, Tokenizer

# Sentencepiece writes a space as this character, so the character itself needs its three bytes.
_SP_SPACE = "\u2581"
# what normalisation and rules for white space would change
_PROBE = " a  b\n\nc\r\n\t\ufb01 \u00e9e\u0301 \uff21"
_TRAINING_CHARACTERS = 8 << 20  # a BPE is trained on about the first so many
_LONGEST_LINE = 4096  # characters; the trainer drops very long lines


class ByteTokenizer(Tokenizer):
    """256 bytes and `eot`."""

    kind = "bytes"

    def __init__(self) -> None:
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""]
        self.eot = 256
        self.eos_ids = (self.eot,)
        self.control = {END: self.eot}

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> ByteTokenizer:
        return cls()

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield np.frombuffer(text.encode(), np.uint8)


class CharTokenizer(Tokenizer):
    """The characters of a text, sorted, and `eot`; other characters are refused by name."""

    kind = "chars"

    def __init__(self, characters: str):
        self.characters = characters
        self.token_bytes = [c.encode() for c in characters] + [b""]
        self.eot = len(characters)
        self.eos_ids = (self.eot,)
        self.control = {END: self.eot}
        self._codes = np.array([ord(c) for c in characters], np.uint32)

    def files(self) -> dict[str, bytes]:
        return {"chars.json": json.dumps(self.characters).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> CharTokenizer:
        return cls(json.loads(content["chars.json"]))

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of the characters in these texts."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls("".join(sorted(characters)))

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            ids = np.searchsorted(self._codes, codes)
            known = ids < self.eot
            known &= self._codes[np.minimum(ids, self.eot - 1)] == codes
            if not known.all():
                at = int(np.argmin(known))
                raise UserError(
                    f"character {text[at]!r} at position {at} is not in the vocabulary of "
                    f"{self.eot} characters; use data.tokenizer = 'bytes' for any text"
                )
            yield ids


class SentencePieceTokenizer(Tokenizer):
    """BPE with byte fallback, by the library sentencepiece.

    Long texts are encoded line by line: the library slows down on long strings, and no piece
    spans the end of a line.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        sp = self._sp
        byte_ids = [sp.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        if sp.unk_id() in byte_ids or sp.eos_id() < 0:
            raise UserError(
                "this sentencepiece model has no byte fallback or no end symbol: it cannot hold "
                "every text; train one with data.tokenizer = 'sentencepiece'"
            )
        self.eot = sp.eos_id()
        self.eos_ids = (self.eot,)
        self.control = {END: self.eot}
        self._sp_space_ids = [byte_ids[b] for b in _SP_SPACE.encode()]
        self.token_bytes = [self._bytes_of(i) for i in range(sp.vocab_size())]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                "this sentencepiece model changes white space or characters, so texts would not "
                "survive it; train one here, or convert with identity normalisation"
            )

    def _bytes_of(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # written as <0x41>
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return b""
        return piece.replace(_SP_SPACE, " ").encode()

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> SentencePieceTokenizer:
        return cls(content["sentencepiece.model"])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """BPE of `vocab_size` pieces, trained on the beginning of the texts; cached by content.

        Raises UserError where there is no text, or too little for so many pieces.
        """
        import sentencepiece

        lines = _training_lines(texts)
        if not lines:
            raise UserError(
                "the training split has no text to train a tokenizer on; check data.path"
            )
        options: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": vocab_size,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "byte_fallback": True,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "user_defined_symbols": ["\n"],
            "bos_id": -1,
            "pad_id": -1,
            "unk_id": 0,
            "eos_id": 1,
            "max_sentence_length": 1 << 20,
            "hard_vocab_limit": False,
            "character_coverage": 0.9999,
        }
        key = files.digest(sentencepiece.__version__, json.dumps(options), "\n".join(lines))
        cached = files.cache_dir("tokenizers") / f"{key[:32]}.model"
        if not cached.exists():
            writer = io.BytesIO()
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines),
                    model_writer=writer,
                    minloglevel=2,
                    num_threads=os.cpu_count(),
                    **options,
                )
            except RuntimeError as error:
                raise UserError(
                    f"data.tokenizer_vocab = {vocab_size}: sentencepiece cannot train it on this "
                    f"text ({str(error)[:120]}); try a smaller vocabulary"
                ) from None
            files.write_bytes(cached, writer.getvalue())
        return cls(cached.read_bytes())

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        lines: list[str] = []
        plan: list[list[int]] = []  # for each text: indices into `lines`, -1 for a literal U+2581
        for text in texts:
            parts: list[int] = []
            for k, part in enumerate(text.split(_SP_SPACE)):
                if k:
                    parts.append(-1)
                for line in part.splitlines(keepends=True) if len(part) > 1000 else [part]:
                    parts.append(len(lines))
                    lines.append(line)
            plan.append(parts)
        encoded = self._sp.encode(lines, num_threads=os.cpu_count() or 1)
        for parts in plan:
            ids = [
                np.asarray(encoded[i] if i >= 0 else self._sp_space_ids, np.int32) for i in parts
            ]
            yield np.concatenate(ids) if ids else np.zeros(0, np.int32)


def _training_lines(texts: Iterable[str]) -> list[str]:
    """Lines of the first _TRAINING_CHARACTERS, without U+2581; longer lines are cut."""
    lines: list[str] = []
    left = _TRAINING_CHARACTERS
    for text in texts:
        text.encode()  # refuses half of a UTF-16 pair
        for line in text[:left].replace(_SP_SPACE, "").splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                lines.append(line[start : start + _LONGEST_LINE])
        left -= len(text)
        if left <= 0:
            break
    return lines
