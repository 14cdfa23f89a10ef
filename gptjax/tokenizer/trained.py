"""Tokenizers without files from elsewhere: bytes, characters, and a BPE trained on a run's text."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.tokenizer import training_text
from gptjax.tokenizer.base import END, Tokenizer
from gptjax.tokenizer.pieces import SPACE

# what normalisation and rules for white space would change
_PROBE = " a  b\n\nc\r\n\t\ufb01 \u00e9e\u0301 \uff21"
_COVERAGE = 0.9999  # of the text's characters; rarer ones are written as bytes
# sentencepiece learns nothing from lines with the first and has no piece for the second; both are
# written as bytes.
_SP_RESERVED, _NO_PIECE = "\u2585", "\0"


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
        # a space is written as SPACE, so that character itself needs its three bytes
        self._sp_space_ids = [byte_ids[b] for b in SPACE.encode()]
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
        return piece.replace(SPACE, " ").encode()

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> SentencePieceTokenizer:
        return cls(content["sentencepiece.model"])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """BPE of `vocab_size` pieces, fewer where the texts give no more; cached by content.

        Trained on a sample that is spread over all texts, whose size is said. Raises UserError
        where there is no text, or the vocabulary is too small for its characters.
        """
        import sentencepiece

        sample = training_text.sample_texts(texts, training_text.LIMIT)
        if not sample.all_characters:
            raise UserError(
                "the training split has no text to train a tokenizer on; check data.path"
            )
        lines = [line for line in sample.lines(without=SPACE) if _SP_RESERVED not in line]
        if not any(lines):
            raise UserError(
                "the training split has nothing that sentencepiece learns from (line ends, U+2581 "
                "and lines with U+2585 are not): set data.tokenizer = 'bytes'"
            )
        options = _trainer_options(lines, vocab_size)
        key = files.digest(sentencepiece.__version__, json.dumps(options), "\n".join(lines))
        cached = files.cache_path("tokenizers", f"{key[:32]}.sentencepiece")
        model = files.read_cached(cached)
        if model is None:
            model = _train(lines, options)
            files.write_cached(cached, model)
        tokenizer = cls(model)
        cli.say(f"tokenizer: trained on {sample}")
        if tokenizer.vocab_size < vocab_size:
            cli.say(
                f"data.tokenizer_vocab = {vocab_size}: this text gives at most "
                f"{tokenizer.vocab_size} pieces, so the vocabulary has that many"
            )
        return tokenizer

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        lines: list[str] = []
        plan: list[list[int]] = []  # for each text: indices into `lines`, -1 for a literal U+2581
        for text in texts:
            parts: list[int] = []
            for k, part in enumerate(text.split(SPACE)):
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


def _trainer_options(lines: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """What sentencepiece is told. Raises UserError where not every character has a place."""
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
        "character_coverage": _COVERAGE,
    }
    alphabet = _alphabet(lines)
    characters = len(alphabet)
    if SPACE not in alphabet:
        # else a space has only the bytes of U+2581, and comes back as that
        options["required_chars"] = SPACE
        alphabet.add(SPACE)
    lowest = len(alphabet) + 256 + 3  # bytes; unknown, the end symbol, the line end
    if vocab_size < lowest:
        raise UserError(
            f"data.tokenizer_vocab = {vocab_size} is too small: the text has {characters:,} "
            "characters, each of which needs a piece beside the 256 bytes.\n"
            f"Set data.tokenizer_vocab to at least {lowest}, or data.tokenizer = 'bytes'."
        )
    return options


def _alphabet(lines: Iterable[str]) -> set[str]:
    """The characters that get a piece each, as sentencepiece chooses them: the most frequent."""
    counts = training_text.count_characters(line.replace(" ", SPACE) for line in lines)
    total = sum(counts.values())
    alphabet: set[str] = set()
    covered = 0
    for character, count in counts.items():
        if np.float32(covered / total) >= np.float32(_COVERAGE):
            break
        covered += count
        if character != _NO_PIECE:
            alphabet.add(character)
    return alphabet


def _train(lines: Iterable[str], options: dict[str, Any]) -> bytes:
    """The model file. Raises UserError with sentencepiece's reason."""
    import sentencepiece

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
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(
            f"data.tokenizer_vocab = {options['vocab_size']}: sentencepiece cannot train on this "
            f"text ({reason.strip()[:200]}); set data.tokenizer = 'bytes'"
        ) from None
    return writer.getvalue()
