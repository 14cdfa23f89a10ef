"""What every tokenizer is: a table from ids to bytes, and a way to encode.

Decoding joins bytes, so it is the same code for all tokenizers, and streaming can hold back half
a character. Id `eot` begins each document and separates it from the one before. Control tokens
(`eot`, `<|im_end|>`, ...) stand for no bytes, and no text is encoded to them.
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
END = "<|endoftext|>"  # the name of `eot` in chat templates, where the vocabulary has none


class Tokenizer:
    """Encodes texts, decodes ids, and is saved in a folder."""

    kind: ClassVar[str]
    token_bytes: list[bytes]  # what each id stands for; control tokens: nothing
    eot: int  # begins each document
    eos_ids: tuple[int, ...]  # ids that end a generated text; the first is the one to write
    bos_ids: tuple[int, ...] = ()  # ids before every prompt, such as Llama's <s>
    control: dict[str, int] = {}  # names of the control tokens in chat templates
    special: dict[str, str] = {}  # {"bos_token": "<s>", ...}: their names by role
    chat_template: str = ""
    leading_space = False  # whether a space is written before the first word; `decode` removes it

    @property
    def vocab_size(self) -> int:
        """Number of ids, with `eot`."""
        return len(self.token_bytes)

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

        Raises UserError for half of a UTF-16 pair.
        """
        try:
            for text in texts:
                text.encode()
            return [np.asarray(ids, np.int32) for ids in self._encode(texts)]
        except UnicodeEncodeError as error:
            raise UserError(
                f"text holds {error.object[error.start]!r}, half of a UTF-16 pair and no "
                "character: decode its source as UTF-16 or drop it"
            ) from None

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

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the ids stand for."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.leading_space and text.startswith(" ") else text

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
    """Turns ids into text one at a time and never emits half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that is complete with this id; may be empty."""
        return self._utf8.decode(self._bytes[token])

    def finish(self) -> str:
        """The rest: U+FFFD where half a character is left."""
        return self._utf8.decode(b"", final=True)
