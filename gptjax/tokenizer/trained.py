"""Vocabularies without a list of merges: bytes, characters, and the sentencepiece BPE that a run trains on its own text."""

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

_SP_SPACE = "\u2581"  # sentencepiece writes a space as this character, so the character itself needs its three bytes
_PROBE = " a  b\n\nc\r\n\t\ufb01 \u00e9e\u0301 \uff21"  # what normalisation and white-space rules would change


class ByteTokenizer(Tokenizer):
    """256 bytes and `eot`."""

    kind = "bytes"

    def __init__(self) -> None:
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""]
        self.eot = 256
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
        self.control = {END: self.eot}
        self._codes = np.array([ord(c) for c in characters], np.uint32)

    def files(self) -> dict[str, bytes]:
        return {"chars.json": json.dumps(self.characters).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> CharTokenizer:
        return cls(json.loads(content["chars.json"]))

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return cls("".join(sorted(found)))

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            ids = np.searchsorted(self._codes, codes)
            known = ids < self.eot
            known &= self._codes[np.minimum(ids, self.eot - 1)] == codes
            if not known.all():
                at = int(np.argmin(known))
                raise UserError(
                    f"character {text[at]!r} at position {at} is not in the vocabulary of {self.eot} characters; use data.tokenizer = 'bytes' for any text"
                )
            yield ids


class SentencePieceTokenizer(Tokenizer):
    """Byte-fallback BPE; encoded line by line, because the library slows down on long strings and no piece spans a line end."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        sp, size = self._sp, self._sp.vocab_size()
        pieces = [sp.id_to_piece(i) for i in range(size)]
        if (
            not all(sp.piece_to_id(f"<0x{b:02X}>") != sp.unk_id() for b in range(256))
            or sp.eos_id() < 0
        ):
            raise UserError(
                "this sentencepiece model has no byte fallback or no end symbol: it cannot hold every text; train one with data.tokenizer = 'sentencepiece'"
            )
        self.eot = sp.eos_id()
        self.control = {END: self.eot}
        self._three = [sp.piece_to_id(f"<0x{b:02X}>") for b in _SP_SPACE.encode()]
        self.token_bytes = [
            bytes([int(p[3:5], 16)])
            if sp.is_byte(i)
            else b""
            if sp.is_control(i) or sp.is_unknown(i)
            else p.replace(_SP_SPACE, " ").encode()
            for i, p in enumerate(pieces)
        ]

        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                "this sentencepiece model changes white space or characters, so texts would not survive it; train one here, or convert with identity normalisation"
            )

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> SentencePieceTokenizer:
        return cls(content["sentencepiece.model"])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """BPE of `vocab_size` pieces from about the first 8 MB of the lines that `texts` yields; cached by content."""
        import sentencepiece

        lines: list[str] = []
        budget = 8 << 20
        for text in texts:
            text.encode()
            for line in text[:budget].replace(_SP_SPACE, "").splitlines():
                lines += [
                    line[i : i + 4096] for i in range(0, len(line), 4096)
                ]  # the trainer drops very long lines
            budget -= len(text)
            if budget <= 0:
                break
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
                    f"data.tokenizer_vocab = {vocab_size}: sentencepiece cannot train it on this text ({str(error)[:120]}); try a smaller vocabulary"
                ) from None
            files.write_bytes(cached, writer.getvalue())
        return cls(cached.read_bytes())

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        lines: list[str] = []
        plan: list[list[int]] = []  # per text: indices into `lines`, -1 for a literal U+2581
        for text in texts:
            plan.append([])
            for k, part in enumerate(text.split(_SP_SPACE)):
                if k:
                    plan[-1].append(-1)
                for line in part.splitlines(keepends=True) if len(part) > 1000 else [part]:
                    plan[-1].append(len(lines))
                    lines.append(line)
        encoded = self._sp.encode(lines, num_threads=os.cpu_count() or 1)
        for parts in plan:
            pieces = [np.asarray(encoded[i] if i >= 0 else self._three, np.int32) for i in parts]
            yield np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
