"""A `tokenizer.model` without a tokenizer.json, run by the library `sentencepiece`.

All settings inside the file are honoured by that library: the kind of model, the normaliser, the
space before the first word, user-defined symbols, bytes for what is unknown. Tokens that other
files add are cut off first, and what is between them is encoded piece by piece.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer import file_keys
from gptjax.tokenizer.added_tokens import Added, roles

SPACE = "\u2581"  # how pieces write a space
# Two messages of one field are merged when a model is read, so these bytes at its end set
# normalizer_spec.add_dummy_prefix.
_PREFIX_SETTING = {False: b"\x1a\x02\x18\x00", True: b"\x1a\x02\x18\x01"}


class PieceReader:
    """Encodes and decodes as sentencepiece does; the attributes are those of `LibraryReader`.

    settings: add_bos_token (absent: yes), add_prefix_space (absent: as the model says) and legacy
    (absent: yes, a space is written after every added token as well as before the text).
    """

    suffix: list[int] = []
    is_bpe = True  # no clean-up of spaces

    def __init__(self, model: bytes, added: Sequence[Added], settings: Mapping[str, Any]):
        import sentencepiece

        fields = file_keys.read_sentencepiece_fields(model)
        file_keys.SENTENCEPIECE.check(fields, "tokenizer.model")
        prefix = settings.get("add_prefix_space")
        if prefix is None:
            prefix = bool(fields.get("normalizer_spec.add_dummy_prefix", True))
        model += _PREFIX_SETTING[bool(prefix)]
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._inner = self._sp  # encodes what follows an added token
        if settings.get("legacy") is False:
            self._inner = sentencepiece.SentencePieceProcessor(
                model_proto=model + _PREFIX_SETTING[False]
            )
        self._removes_spaces = bool(fields.get("normalizer_spec.remove_extra_whitespaces", True))
        self.leading_space = bool(prefix) or self._removes_spaces
        self.decodes_by_bytes = not self._removes_spaces
        self.base_size = self._sp.vocab_size()
        self._added = self._place(added)
        self.size = max([self.base_size - 1, *self._added.values()]) + 1
        special = {token.content for token in added if token.special}
        self.control = {name: i for name, i in self._added.items() if name in special}
        for i in range(self.base_size):
            if self._sp.is_control(i) or self._sp.is_unknown(i):
                self.control.setdefault(self._sp.id_to_piece(i), i)
        self.token_bytes = self._table()
        flags = {token.content: token for token in added}
        uncut = [name for name in self._added if name not in self.control]
        self._plain = _pattern(uncut, flags)
        self._template = _pattern([*uncut, *self.control], flags)
        self.prefix = self._bos(settings)

    def _place(self, added: Sequence[Added]) -> dict[str, int]:
        """{text: id} of the added tokens. Raises UserError where an id is taken."""
        pieces = {self._sp.id_to_piece(i): i for i in range(self.base_size)}
        placed: dict[str, int] = {}
        for token in added:
            if token.content in pieces:
                i = pieces[token.content]
            elif token.id is not None:
                i = token.id
            else:
                i = max([self.base_size - 1, *placed.values()]) + 1
            if token.id not in (None, i) or (i < self.base_size and token.content not in pieces):
                raise UserError(
                    f"the tokenizer's files give {token.content!r} the id {token.id}, which "
                    "tokenizer.model gives otherwise: save the tokenizer with transformers, so "
                    "that the folder has a tokenizer.json"
                )
            placed[token.content] = i
        return placed

    def _bos(self, settings: Mapping[str, Any]) -> list[int]:
        if settings.get("add_bos_token") is False:
            return []
        name = roles(settings).get("bos_token")
        if name is None:
            return [self._sp.bos_id()] if self._sp.bos_id() >= 0 else []
        return [self.control[name]]  # every named token is a control token

    def _table(self) -> list[bytes]:
        table = [b""] * self.size
        for i in range(self.base_size):
            piece = self._sp.id_to_piece(i)
            if self._sp.is_byte(i):
                table[i] = bytes([int(piece[3:5], 16)])  # written as <0x41>
            else:
                table[i] = piece.replace(SPACE, " ").encode()
        for name, i in self._added.items():
            table[i] = name.replace(SPACE, " ").encode()
        for i in self.control.values():
            table[i] = b""
        return table

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """Ids of texts, in which names of control tokens stay text."""
        if self._plain is None:
            return self._sp.encode(list(texts), num_threads=os.cpu_count() or 1)
        return [self._encode(text, self._plain, "") for text in texts]

    def encode_template(self, text: str, guard: str) -> list[int]:
        """Ids of a text in which names of control tokens, without the guard, are those tokens."""
        return self._encode(text, self._template, guard)

    def _encode(self, text: str, tokens: re.Pattern[str] | None, guard: str) -> list[int]:
        ids = {**self._added, **self.control}
        result: list[int] = []
        at = 0
        for match in tokens.finditer(text) if tokens else ():
            result += self._encode_between(text[at : match.start()], at, guard)
            result.append(ids[match[0].strip()] if match[0] not in ids else ids[match[0]])
            at = match.end()
        return result + self._encode_between(text[at:], at, guard)

    def _encode_between(self, text: str, at: int, guard: str) -> list[int]:
        if guard:
            text = text.replace(guard, "")
        reader = self._inner if at else self._sp
        return list(reader.encode(text)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without control tokens."""
        known = [self.token_bytes[i] for i in ids if i < len(self.token_bytes)]
        text = b"".join(known).decode(errors="replace")
        if self._removes_spaces:
            return text.lstrip(" ")
        return text[1:] if self.leading_space and text.startswith(" ") else text


def _pattern(names: Sequence[str], flags: Mapping[str, Added]) -> re.Pattern[str] | None:
    parts = []
    for name in sorted(names, key=len, reverse=True):
        part, token = re.escape(name), flags.get(name)
        if token and token.single_word:
            part = rf"(?<!\w){part}(?!\w)"
        if token and token.lstrip:
            part = r"\s*" + part
        if token and token.rstrip:
            part += r"\s*"
        parts.append(part)
    return re.compile("|".join(parts)) if parts else None
