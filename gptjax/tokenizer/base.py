"""What every tokenizer is: a way to encode, and to decode.

Nearly all are a table from ids to bytes, and decoding joins bytes, so that streaming can hold back
half a character. Where a text is more than the bytes of its ids (words with spaces between them),
`joins_bytes` is False, and an id has a text only among other ids. Id `eot` begins each document
and separates it from the one before. Control tokens (`eot`, `<|im_end|>`, ...) stand for no bytes,
and no text is encoded to them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import files
from gptjax.core.characters import check_characters

FORMAT = "gptjax_tokenizer.json"
END = "<|endoftext|>"  # the name of `eot` in chat templates, where the vocabulary has none


class Tokenizer:
    """Encodes texts, decodes ids, and is saved in a folder."""

    kind: ClassVar[str]
    joins_bytes = True  # whether a text is the bytes of its ids, one after another
    eot: int  # begins each document
    eos_ids: tuple[int, ...]  # ids that end a generated text; the first is the one to write
    bos_ids: tuple[int, ...] = ()  # ids before every prompt, such as Llama's <s>
    end_ids: tuple[int, ...] = ()  # ids that its library writes after a whole text
    control: dict[str, int] = {}  # names of the control tokens in chat templates
    special: dict[str, str] = {}  # {"bos_token": "<s>", ...}: their names by role
    chat_template: str = ""
    templates: dict[str, str] = {}  # all chat templates of the files by name; "default" is usual
    leading_space = False  # whether a space is written before the first word; `decode` removes it

    _token_bytes: list[bytes]

    @property
    def token_bytes(self) -> list[bytes]:
        """What each id stands for; control tokens: nothing. Raises UserError without such bytes."""
        if not self.joins_bytes:
            raise UserError(
                "this checkpoint's tokenizer decodes words, not bytes: no single token has a text "
                "of its own"
            )
        return self._token_bytes

    @token_bytes.setter
    def token_bytes(self, table: list[bytes]) -> None:
        self._token_bytes = table

    @property
    def vocab_size(self) -> int:
        """Number of ids, with `eot`."""
        return len(self.token_bytes)

    def restrict(self, rows: int) -> None:
        """Takes a model's table of so many rows, fewer than ids: those past it become unreachable.

        Raises UserError where text needs them.
        """
        raise UserError(
            f"the tokenizer has {self.vocab_size:,} tokens and the model {rows:,}: "
            "they do not belong together"
        )

    def files(self) -> dict[str, bytes]:
        """All that defines the vocabulary, by file name."""
        raise NotImplementedError

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> Tokenizer:
        """The tokenizer whose `files` these are."""
        raise NotImplementedError

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int] | np.ndarray]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without `eot` or `bos_ids`. Uses all cores.

        Raises UserError for what is no character (`check_characters`).
        """
        for text in texts:
            check_characters(text, "the text")
        return [np.asarray(ids, np.int32) for ids in self._encode(texts)]

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0].tolist()

    def encode_template(self, text: str, guard: str = "") -> list[int]:
        """Ids of a filled chat template, in which names of control tokens become those tokens.

        guard: a string that occurs nowhere else; a name with the guard inside stays text, and the
        guard is removed. So a template can write control tokens and a user's text cannot.
        """
        names = sorted(self.control, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
        ids: list[int] = []
        for part in parts:
            if part in self.control:
                ids.append(self.control[part])
            else:
                ids += self.encode(part.replace(guard, "") if guard else part)
        return ids

    def template_for(self, tools: Any) -> str:
        """The chat template, or the one named "tool_use" where the files have one and there are
        tools; "" where there is none."""
        if tools and self.chat_template == self.templates.get("default", ""):
            return self.templates.get("tool_use", self.chat_template)
        return self.chat_template

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the ids stand for, in UTF-8. Ids past the vocabulary, for which a model may have
        rows, stand for nothing."""
        if not self.joins_bytes:
            return self.decode(ids).encode()
        table = self.token_bytes
        return b"".join(table[i] for i in ids if i < len(table))

    def byte_counts(self, ids_BT: np.ndarray) -> np.ndarray:
        """int [B, T]: how many bytes of text each id adds to those before it in its row."""
        if self.joins_bytes:
            return np.array([len(text) for text in self.token_bytes])[ids_BT]
        counts = np.zeros(ids_BT.shape, np.int64)
        for row, ids in enumerate(ids_BT):
            decoder = StreamDecoder(self)
            for column, token in enumerate(ids.tolist()):
                counts[row, column] = len(decoder.feed(token).encode())
            counts[row, -1:] += len(decoder.finish().encode())
        return counts

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.leading_space and text.startswith(" ") else text

    def count_settled(self, text: str) -> int:
        """How many characters at the beginning of a decoded text no further id can change."""
        return len(text.rstrip("\ufffd"))

    def decode_by_file(self, ids: Iterable[int]) -> str:
        """Text of the ids without control tokens, by the decoder of the checkpoint's own file.

        It decides what bytes that are not UTF-8 become. Without a file this is `decode`.
        """
        return self.decode(ids)

    @property
    def fingerprint(self) -> str:
        """A hash of the kind and the files; runs store it."""
        parts: list[str | bytes] = [self.kind]
        for name, data in sorted(self.files().items()):
            parts += [name, data]
        return files.digest(*parts)

    def save(self, folder: Path) -> None:
        """Writes the files, and FORMAT, which says how to read them."""
        content = self.files()
        for name, data in content.items():
            files.write_bytes(folder / name, data)
        info = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eot": self.eot,
            "files": sorted(content),
            "fingerprint": self.fingerprint,
            # a run may have brought its own template, which is in none of the files
            "chat_template": self.chat_template,
        }
        files.write_text(folder / FORMAT, json.dumps(info, indent=1))


class StreamDecoder:
    """Turns ids into text one at a time and never emits half a character.

    before: ids that stand before the text, such as a prompt's. Ids past the vocabulary have no
    text.
    """

    _CONTEXT = 16  # ids before a token that its text can depend on
    _LONGEST = 64  # ids that are decoded again with each token, at most

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._size = tokenizer.vocab_size
        self._ids = [i for i in before[-self._CONTEXT :] if i < self._size]
        self._written = "" if tokenizer.joins_bytes else tokenizer.decode(self._ids)

    def feed(self, token: int) -> str:
        """The text that is complete with this id; may be empty."""
        if token >= self._size:
            return ""
        if self._tokenizer.joins_bytes:
            return self._utf8.decode(self._tokenizer.token_bytes[token])
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = text[len(self._written) : self._tokenizer.count_settled(text)]
        self._written += new
        if len(self._ids) >= self._LONGEST and self._written == text:
            self._ids = self._ids[-self._CONTEXT :]
            self._written = self._tokenizer.decode(self._ids)
        return new

    def finish(self) -> str:
        """The rest: U+FFFD where half a character is left."""
        if self._tokenizer.joins_bytes:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._ids)[len(self._written) :]
