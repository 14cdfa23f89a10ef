"""What every tokenizer is: a table id -> bytes, and a way to encode.

Decoding joins bytes, so it is the same code for all and streaming can hold back half a character. Id `eot` begins each
document and separates it from the one before; `control` tokens (that one, `<|im_end|>`, ...) stand for no bytes, and no text encodes to them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core import files

FORMAT = "gptjax_tokenizer.json"
END = "<|endoftext|>"  # how `eot` is written in chat templates, where the vocabulary itself has no name for it


class Tokenizer:
    """encode, decode, save. `vocab_size` counts `eot`; `token_bytes[i]` is what id i stands for (control tokens: nothing)."""

    kind: ClassVar[str]
    token_bytes: list[bytes]
    eot: int
    stops: tuple[int, ...] = ()  # further ids that end a generated text
    prefix: tuple[
        int, ...
    ] = ()  # ids that the vocabulary puts before every prompt, such as Llama's <s>
    control: dict[str, int] = {}  # how control tokens are written in chat templates
    chat_template: str = ""
    special: dict[str, str] = {}  # {"bos_token": "<s>", ...}: what chat templates call them
    leading_space = (
        False  # the vocabulary writes a space before the first word, which `decode` takes off again
    )

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a generated text; the first is the one to write."""
        return self.stops or (self.eot,)

    def files(self) -> dict[str, bytes]:
        """All that defines the vocabulary, by file name."""
        raise NotImplementedError

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> Tokenizer:
        raise NotImplementedError

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int] | np.ndarray]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without `eot` or `prefix`. Uses all cores. Raises UserError for lone surrogates."""
        try:
            for text in texts:
                text.encode()
            return [np.asarray(ids, np.int32) for ids in self._encode(texts)]
        except UnicodeEncodeError as error:
            raise UserError(
                f"text holds {error.object[error.start]!r}, half of a UTF-16 pair and no character: decode its source as UTF-16 or drop it"
            ) from None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_template(self, text: str, guard: str = "") -> list[int]:
        """Ids of a filled chat template: names of `control` tokens become those tokens, except where `guard`, a string that occurs
        nowhere else, stands inside them (it is taken out). So a template can write control tokens and a user's text cannot."""
        names = sorted(self.control, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
        ids: list[int] = []
        for part in parts:
            ids += (
                [self.control[part]]
                if part in self.control
                else self.encode(part.replace(guard, "") if guard else part)
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.leading_space and text.startswith(" ") else text

    @property
    def fingerprint(self) -> str:
        content = self.files()
        return files.digest(
            self.kind, *(part for name in sorted(content) for part in (name, content[name]))
        )

    def save(self, folder: Path) -> None:
        content = self.files()
        for name, data in content.items():
            files.write_bytes(folder / name, data)
        info = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eot": self.eot,
            "files": sorted(content),
            "fingerprint": self.fingerprint,
        }
        info["chat_template"] = (
            self.chat_template
        )  # it may be one that the run brought, so in none of the files
        files.write_text(folder / FORMAT, json.dumps(info, indent=1))


class StreamDecoder:
    """Turns ids into text one at a time and never emits half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(self._bytes[token])

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)
