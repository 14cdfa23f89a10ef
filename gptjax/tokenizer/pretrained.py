"""Tokenizers that come with a checkpoint.

In: Hugging Face's `tokenizer.json` or the older files, or the vocabulary in a GGUF file, which is
rewritten as a `tokenizer.json` first. `LibraryReader` runs a tokenizer.json, and `PieceReader` a
tokenizer.model that stands alone. Ids and text are those of their libraries; what is not honoured
is refused by name, by the tables in `file_keys.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.tokenizer import file_keys, older_files, template_files
from gptjax.tokenizer.added_tokens import read_added, read_settings, roles
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.library import LibraryReader, complete
from gptjax.tokenizer.openai import OpenAITokenizer, byte_letters
from gptjax.tokenizer.pieces import PieceReader

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    template_files.FILE,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.txt",
)
_OLDER = ("added_tokens.json", "vocab.txt")  # read where there is no tokenizer.json
_NOT_READ = ("spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken")
_ROLES = "roles.json"  # next to Hugging Face's files: what the checkpoint's other files say


class PretrainedTokenizer(Tokenizer):
    """Made of Hugging Face's files by name, and of the ids that end a text, the most usual first.

    Without such ids, the files name one. rows: of the model's table, where those are fewer than
    ids. Raises UserError where the files are damaged, name none or are not honoured.
    """

    kind = "pretrained"
    _rows = 0  # of the model's table, where those are fewer than ids

    def __init__(self, content: Mapping[str, bytes], eos_ids: Sequence[int], rows: int = 0):
        further = [name for name in content if name.startswith(template_files.FOLDER)]
        self._content = {name: content[name] for name in [*FILES, *further] if name in content}
        try:
            settings = read_settings(self._content)
            self._read(settings)
            self._set_eos(settings, eos_ids)
            self._check_suffix()
            self.templates = template_files.read_templates(content, settings)
            self.chat_template = self.templates.get("default", "")
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception, and damage can be anywhere
            raise UserError(
                f"{self._main_file} is damaged or of an unknown kind: "
                f"{type(error).__name__}: {str(error)[:200]}"
            ) from None
        if rows:
            self.restrict(rows)

    @property
    def _main_file(self) -> str:
        return "tokenizer.json" if "tokenizer.json" in self._content else "tokenizer.model"

    def _read(self, settings: dict[str, Any]) -> None:
        file_keys.check_settings(self._content, settings)
        added = read_added(self._content, settings)
        self._reader: LibraryReader | PieceReader
        if "tokenizer.json" in self._content:
            self._reader = LibraryReader(self._content["tokenizer.json"], added)
            _say_contradictions(settings, self._reader.says)
        else:
            self._reader = PieceReader(self._content["tokenizer.model"], added, settings)
        self.special = roles(settings)
        self.control = self._reader.control
        self.bos_ids, self.end_ids = tuple(self._reader.prefix), tuple(self._reader.suffix)
        self._size = self._reader.size
        self._cleans_up = not self._reader.is_bpe and bool(
            settings.get("clean_up_tokenization_spaces")
        )
        table = self._reader.token_bytes
        self.joins_bytes = table is not None and not self._cleans_up
        self.leading_space = self.joins_bytes and self._reader.leading_space
        self.token_bytes = table or []

    def _set_eos(self, settings: dict[str, Any], eos_ids: Sequence[int]) -> None:
        if not eos_ids:
            name = roles(settings).get("eos_token", "")
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
        if self.joins_bytes:
            for i in self.eos_ids:
                self.token_bytes[i] = b""

    def _check_suffix(self) -> None:
        """Refuses a template that ends a text with anything but its end.

        A prompt is the beginning of a text, so the end token that such a template writes is left
        out.
        """
        names = {i: name for name, i in self.control.items()}
        ends = {"</s>", "<|endoftext|>", "[SEP]"}
        ends |= {self.special.get(role, "") for role in ("eos_token", "sep_token")}
        for i in self._reader.suffix:
            if i not in self.eos_ids and names.get(i) not in ends:
                raise UserError(
                    f"tokenizer.json writes {names.get(i, f'token {i}')!r} after every text "
                    "(post_processor), which is no end token, and a prompt is not the end of a "
                    "text: take it out of the post-processor and write it into the prompts"
                )

    @property
    def vocab_size(self) -> int:
        return self._rows or self._size

    def restrict(self, rows: int) -> None:
        """See `Tokenizer`. Only added tokens may be past the table: a text is never cut to them."""
        if self._reader.base_size > rows:
            raise UserError(
                f"the tokenizer cuts text into {self._reader.base_size:,} tokens and the model's "
                f"table has {rows:,} rows: they do not belong together"
            )
        for name, ids in (("end", self.eos_ids), ("first", self.bos_ids)):
            if outside := [i for i in ids if i >= rows]:
                raise UserError(
                    f"the {name} token's id {outside[0]} is past the model's table of {rows:,} "
                    f"rows: {self._name_of(outside[0])!r} was added to the tokenizer and not to "
                    "the model"
                )
        self._rows = rows
        if self.joins_bytes:
            self.token_bytes = self.token_bytes[:rows]

    def _name_of(self, token: int) -> str:
        names = {token["id"]: token["content"] for token in self.described()["added_tokens"]}
        return names.get(token, str(token))

    def described(self) -> dict[str, Any]:
        """The tokenizer.json with all added tokens of the other files, as an object.

        Raises UserError for a tokenizer.model, which has none.
        """
        if "tokenizer.json" not in self._content:
            raise UserError(
                "the tokenizer is a tokenizer.model without a tokenizer.json, which this export "
                "needs: use --format=hf, or save the tokenizer with transformers first"
            )
        settings = read_settings(self._content)
        return complete(self._content["tokenizer.json"], read_added(self._content, settings))

    def files(self) -> dict[str, bytes]:
        said: dict[str, Any] = {"stops": list(self.eos_ids)}
        if self._rows:
            said["rows"] = self._rows
        return {**self._content, _ROLES: json.dumps(said).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> PretrainedTokenizer:
        said = json.loads(content[_ROLES])
        return cls(content, said["stops"], said.get("rows", 0))

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: Sequence[int]) -> PretrainedTokenizer | None:
        """The tokenizer in the folder of a Hugging Face checkpoint; None where it has none.

        Raises UserError where its files are damaged or not honoured.
        """
        content = {}
        for name in FILES:
            if (folder / name).is_file():
                content[name] = (folder / name).read_bytes()
        try:
            if "tokenizer.json" in content:
                content = {name: data for name, data in content.items() if name not in _OLDER}
            else:
                config_file = folder / "config.json"
                config = json.loads(config_file.read_bytes()) if config_file.is_file() else {}
                content = _of_older_files(content, config)
        except UserError:
            raise
        except Exception as error:  # JSON, UTF-8, and whatever the libraries raise
            raise UserError(
                f"{folder}: the tokenizer's files are damaged: "
                f"{type(error).__name__}: {str(error)[:150]}"
            ) from None
        if not content:
            _say_not_read(folder)
            return None
        return cls(content | template_files.additional_files(folder), eos_ids)

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        for ids in self._reader.encode_batch(texts):
            self._require_rows(ids)
            yield ids

    def _require_rows(self, ids: Sequence[int]) -> None:
        """Refuses ids past the model's table. Raises UserError."""
        if self._rows and max(ids, default=0) >= self._rows:
            token = max(ids)
            raise UserError(
                f"the text holds {self._name_of(token)!r}, token {token}, and the model's table "
                f"has {self._rows:,} rows: the token was added to the tokenizer and the model "
                "knows nothing of it. Take it out of the text"
            )

    def encode_template(self, text: str, guard: str = "") -> list[int]:
        ids = self._reader.encode_template(text, guard)
        self._require_rows(ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        if self.joins_bytes and self._reader.decodes_by_bytes:
            return super().decode(ids)
        return self.decode_by_file([i for i in ids if i not in self.eos_ids])

    def decode_by_file(self, ids: Iterable[int]) -> str:
        text = self._reader.decode(list(ids))
        return _clean_up(text) if self._cleans_up else text

    def count_settled(self, text: str) -> int:
        settled = super().count_settled(text)
        if self._cleans_up:  # the next characters may take a space near the end away
            space = text.rfind(" ", max(0, settled - 3), settled)
            settled = space if space >= 0 else settled
        return settled


def _clean_up(text: str) -> str:
    """What transformers does for clean_up_tokenization_spaces."""
    for ending in (" .", " ?", " !", " ,"):
        text = text.replace(ending, ending[1:])
    text = text.replace(" ' ", "'")
    for ending in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending[1:])
    return text


def _say_contradictions(settings: Mapping[str, Any], says: Mapping[str, Any]) -> None:
    """Tells where the settings and tokenizer.json say different things of the same."""
    for key, value in says.items():
        setting = settings.get(key)
        if setting is not None and setting != value:
            cli.say(
                f"note: tokenizer_config.json says {key} = {json.dumps(setting)} and "
                f"tokenizer.json {json.dumps(value)}: tokenizer.json is followed"
            )


def _say_not_read(folder: Path) -> None:
    """Names the files of a tokenizer that make none by themselves."""
    patterns = (*_NOT_READ, *FILES)
    if names := [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]:
        cli.say(
            f"note: {folder} has {', '.join(names)}, of which no tokenizer is made here, so the "
            "model knows token ids only: save the tokenizer with transformers, which writes a "
            "tokenizer.json"
        )


def _of_older_files(content: dict[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The content with a `tokenizer.json` made of the older files, or with a tokenizer.model.

    Nothing where there is neither. Raises UserError.
    """
    settings = read_settings(content)
    name = older_files.tokenizer_class(settings, config)
    if "vocab.txt" in content and ("merges.txt" in content or "tokenizer.model" in content):
        del content["vocab.txt"]
    rewritten = older_files.rewrite(content, settings, name)
    if rewritten is not None:
        others = {name: data for name, data in content.items() if name not in _OLDER}
        return {"tokenizer.json": rewritten, **others}
    if "tokenizer.model" in content:
        older_files.require_sentencepiece_class(name)
        return content
    return {}


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
        "tokenizer.json": older_files.byte_level_json(ids, merges, control=["<|endoftext|>"]),
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
