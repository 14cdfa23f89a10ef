"""Tokenizers that come with a checkpoint.

In: Hugging Face's `tokenizer.json` (or the older files), or the vocabulary in a GGUF file, which
is rewritten as a `tokenizer.json` first. All are run by the library `tokenizers`. Byte-level BPE
(GPT-2, NeoX, Llama 3, Qwen, SmolLM2) and sentencepiece-like BPE with byte fallback (Llama 2,
Mistral) become the same table of bytes.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.openai import OpenAITokenizer, byte_letters
from gptjax.tokenizer.rewriting import (
    BYTE,
    CONTROL,
    SPACE,
    TEXT,
    UNKNOWN,
    byte_level_json,
    pieces_json,
)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_ROLES = "roles.json"  # next to Hugging Face's files: {"stops": the ids that end a text}
_LARGEST_ID = 1 << 24


class PretrainedTokenizer(Tokenizer):
    """Made of Hugging Face's files by name, and of the ids that end a text, the most usual first.

    Without such ids, the files name one. Raises UserError where the files are damaged or name none.
    """

    kind = "pretrained"

    def __init__(self, content: dict[str, bytes], eos_ids: Sequence[int]):
        import tokenizers

        self._content = {name: content[name] for name in FILES if name in content}
        try:
            self._plain = tokenizers.Tokenizer.from_buffer(content["tokenizer.json"])
            settings = json.loads(content.get("tokenizer_config.json", b"{}"))
            self._read_tokens(settings)
            self._set_eos(settings, eos_ids)
            self.chat_template = _chat_template(content, settings)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception, and damage can be anywhere
            raise UserError(
                "tokenizer.json is damaged or of an unknown kind: "
                f"{type(error).__name__}: {str(error)[:200]}"
            ) from None

    def _read_tokens(self, settings: dict[str, Any]) -> None:
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True  # names of control tokens in a text stay text
        self.special = {}
        for name, token in settings.items():
            if name.endswith("_token") and isinstance(token, str | Mapping):
                self.special[name] = _text_of(token)
        added = self._plain.get_added_tokens_decoder()
        self.control = {token.content: i for i, token in added.items() if token.special}
        self._fill_table(added)
        plain = self._plain.encode("a", add_special_tokens=False).ids
        with_bos = self._plain.encode("a", add_special_tokens=True).ids
        self.bos_ids = ()
        if with_bos[-1:] == plain[-1:]:  # else the tokenizer adds something at the end
            self.bos_ids = tuple(with_bos[: len(with_bos) - len(plain)])

    def _set_eos(self, settings: dict[str, Any], eos_ids: Sequence[int]) -> None:
        if not eos_ids:
            name = _text_of(settings.get("eos_token"))
            usual = ("<|endoftext|>", "</s>")
            if name in self.control:
                eos_ids = [self.control[name]]
            else:
                eos_ids = [i for name, i in self.control.items() if name in usual]
        if outside := [i for i in eos_ids if not 0 <= i < self.vocab_size]:
            raise UserError(
                f"the end-of-text ids {outside} are outside the tokenizer's "
                f"{self.vocab_size:,} tokens"
            )
        if not eos_ids:
            raise UserError(
                "the tokenizer names no end-of-text token: set eos_token_id in config.json"
            )
        self.eos_ids, self.eot = tuple(eos_ids), eos_ids[0]
        for i in self.eos_ids:
            self.token_bytes[i] = b""

    def decode_by_file(self, ids: Iterable[int]) -> str:
        return self._with_control.decode(list(ids))

    @functools.cached_property
    def _with_control(self) -> Any:
        """A second reader of the same file, which makes control tokens of their names in a text.

        Only chat templates and the harness of evaluation tasks need it.
        """
        import tokenizers

        reader = tokenizers.Tokenizer.from_buffer(self._content["tokenizer.json"])
        reader.no_truncation()
        reader.no_padding()
        return reader

    def _fill_table(self, added: dict[int, Any]) -> None:
        """Sets `token_bytes` and `leading_space`. added: the tokens that are not in the model."""
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values(), default=-1)
        if largest > _LARGEST_ID:
            raise UserError(f"tokenizer.json gives a token the id {largest:,}: it is damaged")
        self.token_bytes = [b""] * (largest + 1)
        byte_level = "ByteLevel(" in f"{self._plain.decoder} {self._plain.pre_tokenizer}"
        bytes_of = _bytes_of_letters() if byte_level else _bytes_of_piece
        for token, i in vocabulary.items():
            if i in added:
                self.token_bytes[i] = b"" if added[i].special else added[i].content.encode()
            else:
                self.token_bytes[i] = bytes_of(token)
        plain = self._plain.encode("a", add_special_tokens=False).ids
        self.leading_space = not byte_level and self.decode_bytes(plain) == b" a"

    def files(self) -> dict[str, bytes]:
        return {**self._content, _ROLES: json.dumps({"stops": list(self.eos_ids)}).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> PretrainedTokenizer:
        return cls(content, json.loads(content[_ROLES])["stops"])

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: Sequence[int]) -> PretrainedTokenizer | None:
        """The tokenizer in the folder of a Hugging Face checkpoint; None where it has none.

        Raises UserError where its files are damaged.
        """
        content = {}
        for name in FILES:
            if (folder / name).is_file():
                content[name] = (folder / name).read_bytes()
        if "tokenizer.json" not in content:
            try:
                content |= _rewrite_older_files(content)
            except UserError:
                raise
            except Exception as error:  # JSON, UTF-8, and whatever the libraries raise
                raise UserError(
                    f"{folder}: the tokenizer's files are damaged: "
                    f"{type(error).__name__}: {str(error)[:150]}"
                ) from None
        return cls(content, eos_ids) if "tokenizer.json" in content else None

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        for encoded in self._plain.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoded.ids

    def encode_template(self, text: str, guard: str = "") -> list[int]:
        if guard and guard in text:
            return super().encode_template(text, guard)
        return self._with_control.encode(text, add_special_tokens=False).ids


def _text_of(token: Any) -> str:
    """A token of tokenizer_config.json: a text, a mapping with its content, or nothing."""
    return token.get("content", "") if isinstance(token, Mapping) else token or ""


def _chat_template(content: dict[str, bytes], settings: dict[str, Any]) -> str:
    """The template of the files, or "". Raises UserError where it is no text."""
    template: Any = content.get("chat_template.jinja", b"").decode()
    template = template or settings.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t["name"] == "default"), "")
    if not isinstance(template, str):
        raise UserError(f"the chat template is a {type(template).__name__} instead of a text")
    return template


def _bytes_of_letters() -> Callable[[str], bytes]:
    """A function from a token, as byte-level BPE files write it, to its bytes."""
    table = {chr(b): "\uffff" for b in range(256)}  # not of the alphabet: fails to encode
    for letter, byte in byte_letters().items():
        table[letter] = chr(byte)
    letters = str.maketrans(table)

    def bytes_of(token: str) -> bytes:
        try:
            return token.translate(letters).encode("latin-1")
        except UnicodeEncodeError:  # not written in that alphabet
            return token.encode()

    return bytes_of


def _bytes_of_piece(token: str) -> bytes:
    """The bytes of a piece of sentencepiece, which writes byte 65 as <0x41>."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _rewrite_older_files(content: dict[str, bytes]) -> dict[str, bytes]:
    """A `tokenizer.json` made of the older files; nothing where there are none."""
    if "vocab.json" in content and "merges.txt" in content:
        lines = content["merges.txt"].decode().splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        vocabulary = json.loads(content["vocab.json"])
        rewritten = byte_level_json(vocabulary, merges, control=["<|endoftext|>"], digits=False)
        return {"tokenizer.json": rewritten}
    if "tokenizer.model" in content:
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_proto=content["tokenizer.model"])
        ids = range(sp.vocab_size())
        rewritten = pieces_json(
            [sp.id_to_piece(i) for i in ids],
            [sp.get_score(i) for i in ids],
            [_piece_type(sp, i) for i in ids],
            bos=sp.bos_id(),
        )
        return {"tokenizer.json": rewritten}
    return {}


def _piece_type(sp: Any, i: int) -> int:
    if sp.is_control(i):
        return CONTROL
    if sp.is_unknown(i):
        return UNKNOWN
    return BYTE if sp.is_byte(i) else TEXT


def from_gpt2(tokenizer: OpenAITokenizer) -> PretrainedTokenizer:
    """GPT-2's tokenizer in Hugging Face's form."""
    letters = {b: letter for letter, b in byte_letters().items()}
    tokens = ["".join(letters[b] for b in token) for token in tokenizer.token_bytes[:-1]]
    ids = {token: i for i, token in enumerate(tokens)} | {"<|endoftext|>": tokenizer.eot}
    merges = [_last_merge(token, ids) for token in tokens if len(token) > 1]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    content = {
        "tokenizer.json": byte_level_json(ids, merges, control=["<|endoftext|>"], digits=False),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }
    return PretrainedTokenizer(content, [tokenizer.eot])


def _last_merge(token: str, ids: Mapping[str, int]) -> str:
    """The pair that made `token`: merging its letters in order of rank until two parts are left."""
    parts = list(token)
    while len(parts) > 2:
        ranks = [ids.get(a + b, len(ids)) for a, b in itertools.pairwise(parts)]
        best = ranks.index(min(ranks))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return " ".join(parts)
