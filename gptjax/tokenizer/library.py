"""A `tokenizer.json`, run by the library `tokenizers`: whatever it says is honoured.

Control tokens get unguessable names inside (see `_rename`), so that one reader takes templates,
which write control tokens, and texts of users, which cannot.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer import file_keys
from gptjax.tokenizer.added_tokens import Added
from gptjax.tokenizer.openai import byte_letters

_LARGEST_ID = 1 << 24
_PIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def complete(data: bytes, added: Sequence[Added]) -> dict[str, Any]:
    """tokenizer.json with the tokens that the other files add or make control tokens.

    Raises UserError for keys that are not honoured and ids that are not those of the library.
    """
    described = json.loads(data)
    file_keys.check_tokenizer_json(described)
    vocabulary = vocabulary_of(described)
    entries = {token["content"]: token for token in described.get("added_tokens") or []}
    largest = max((vocabulary | {t: e["id"] for t, e in entries.items()}).values(), default=-1)
    if largest > _LARGEST_ID:
        raise UserError(f"tokenizer.json gives a token the id {largest:,}: it is damaged")
    for token in added:
        if token.content in entries:
            if token.special:
                entries[token.content]["special"] = True
            known = entries[token.content]["id"]
        else:
            free = largest + 1 if token.id is None else token.id
            known = vocabulary.get(token.content, free)
            entries[token.content] = token.described(known)
            largest = max(largest, known)
        if token.id not in (None, known):
            raise UserError(
                f"the tokenizer's files give {token.content!r} the ids {token.id} and {known}"
            )
    described["added_tokens"] = sorted(entries.values(), key=lambda token: token["id"])
    _keep_ids(described, vocabulary)
    return described


def _keep_ids(described: dict[str, Any], vocabulary: Mapping[str, int]) -> None:
    """Writes added tokens into the model's vocabulary where the library would number them anew.

    It gives those that the vocabulary lacks the ids after it, whatever the file says. Raises
    UserError where two tokens have one id, or the vocabulary is a list without gaps.
    """
    entries = described["added_tokens"]
    lacking = {e["content"]: e["id"] for e in entries if e["content"] not in vocabulary}
    owners = {i: token for token, i in vocabulary.items()}
    for token, i in lacking.items():
        if i in owners:
            raise UserError(f"the tokenizer's files give {owners[i]!r} and {token!r} one id, {i}")
    first = len(vocabulary)
    if list(lacking.values()) == list(range(first, first + len(lacking))):
        return
    if isinstance(described["model"]["vocab"], list):
        token, i = next(iter(lacking.items()))
        raise UserError(
            f"the tokenizer's files give {token!r} the id {i}: ids of added tokens must follow the "
            f"vocabulary's {first:,} without a gap"
        )
    described["model"]["vocab"] = {**vocabulary, **lacking}


def vocabulary_of(described: Mapping[str, Any]) -> dict[str, int]:
    """{token: id} of the model in a tokenizer.json, without added tokens."""
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
        return {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


class LibraryReader:
    """Encodes and decodes as the file says.

    size: ids, with the added tokens'. base_size: those that text is cut to. control: {name:
    id} of the control tokens. token_bytes: what each id stands for, or None where a text is not
    the bytes of its ids one after another. leading_space: whether decoding removes the first
    space. prefix, suffix: ids that the file writes round every text. says: what settings of
    tokenizer_config.json say too, by their names.
    """

    def __init__(self, data: bytes, added: Sequence[Added]):
        import tokenizers

        described = complete(data, added)
        entries = described["added_tokens"]
        vocabulary = vocabulary_of(described)
        names = {token["content"] for token in entries}
        self.base_size = max([-1, *(i for t, i in vocabulary.items() if t not in names)]) + 1
        self.size = max([self.base_size - 1, *(token["id"] for token in entries)]) + 1
        self.control = {token["content"]: token["id"] for token in entries if token["special"]}
        self.is_bpe = described["model"].get("type", "BPE") == "BPE"
        self._secrets = {name: f"zq{secrets.token_hex(16)}" for name in self.control}
        self._pattern = _pattern_of_names([token for token in entries if token["special"]])
        renamed = _rename(described, self._secrets)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(renamed))
        for token in entries:
            name = self._secrets.get(token["content"], token["content"])
            if (number := self._tokenizer.token_to_id(name)) != token["id"]:
                raise UserError(
                    f"tokenizer.json gives {token['content']!r} the id {token['id']}, and it reads "
                    f"as {number}: ids of added tokens must follow the vocabulary's without a gap"
                )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.prefix, self.suffix = self._read_template(vocabulary)
        self.says = _said_twice(described, bool(self.prefix))
        self.token_bytes, self.leading_space = _byte_table(described, vocabulary, self.size)
        kinds = [step.get("type") for step in steps_of(described.get("decoder"))]
        self.decodes_by_bytes = self.token_bytes is not None and "Metaspace" not in kinds

    def _read_template(self, vocabulary: Mapping[str, int]) -> tuple[list[int], list[int]]:
        """Ids that the post-processor writes before and after a text."""
        for probe in ("a", *vocabulary):
            encoding = self._tokenizer.encode(probe, add_special_tokens=True)
            texts = [k for k, mark in enumerate(encoding.special_tokens_mask) if not mark]
            if texts:
                return encoding.ids[: texts[0]], encoding.ids[texts[-1] + 1 :]
        return [], []

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """Ids of texts, in which names of control tokens stay text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_template(self, text: str, guard: str) -> list[int]:
        """Ids of a text in which names of control tokens, without the guard, are those tokens."""
        if self._pattern:
            text = self._pattern.sub(lambda match: self._secrets[match[0]], text)
        if guard:
            text = text.replace(guard, "")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without control tokens, by the file's own decoder."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _pattern_of_names(tokens: Sequence[Mapping[str, Any]]) -> re.Pattern[str] | None:
    names = []
    for token in sorted(tokens, key=lambda token: len(token["content"]), reverse=True):
        name = re.escape(token["content"])
        names.append(rf"(?<!\w){name}(?!\w)" if token.get("single_word") else name)
    return re.compile("|".join(names)) if names else None


def _rename(described: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The file with other names for some tokens.

    A text that spells a control token must stay text. The library has a switch that does not look
    for such tokens, and models that know their names (Unigram, words) find them all the same.
    """
    model = dict(described["model"])
    vocabulary = model["vocab"]
    if any(name in vocabulary for name in names) and "merges" in model:
        model["merges"] = _merges_without(names, model)
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    entries = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in described["added_tokens"]
    ]
    return {**described, "model": model, "added_tokens": entries}


def _merges_without(names: Mapping[str, str], model: Mapping[str, Any]) -> list[Any]:
    """The merges of a BPE but those that a control token takes part in or comes of."""
    prefix = model.get("continuing_subword_prefix") or ""
    merges = []
    for merge in model["merges"]:
        first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
        union = first + second.removeprefix(prefix)
        if first not in names and second not in names and union not in names:
            merges.append(merge)
    return merges


def _said_twice(described: Mapping[str, Any], has_prefix: bool) -> dict[str, Any]:
    """What a tokenizer.json says of the settings that older files had for the same."""
    said: dict[str, Any] = {"add_bos_token": has_prefix}
    for step in [*steps_of(described.get("normalizer")), *steps_of(described.get("pre_tokenizer"))]:
        if step["type"] == "BertNormalizer":
            said["do_lower_case"] = step.get("lowercase", True)
            said["strip_accents"] = step.get("strip_accents")
            said["tokenize_chinese_chars"] = step.get("handle_chinese_chars", True)
        elif step["type"] == "Prepend":
            said["add_prefix_space"] = True
        elif step["type"] == "Metaspace":
            scheme = "always" if step.get("add_prefix_space", True) else "never"
            said["add_prefix_space"] = step.get("prepend_scheme", scheme) != "never"
        elif step["type"] == "ByteLevel" and "add_prefix_space" in step:
            said.setdefault("add_prefix_space", step["add_prefix_space"])
    return said


def steps_of(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder, sequences laid flat."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    steps: list[Mapping[str, Any]] = []
    for inner in next(value for value in part.values() if isinstance(value, list)):
        steps += steps_of(inner)
    return steps


def _byte_table(
    described: Mapping[str, Any], vocabulary: Mapping[str, int], size: int
) -> tuple[list[bytes] | None, bool]:
    """(what each id stands for, whether decoding removes the first space).

    The table is None for a decoder that does more than join the bytes of tokens.
    """
    steps = steps_of(described.get("decoder"))
    kinds = [step["type"] for step in steps]
    leading_space = False
    bytes_of: Callable[[str], bytes]
    cuts = [step["type"] for step in steps_of(described.get("pre_tokenizer"))]
    byte_level = set(kinds) <= {"ByteLevel", "Fuse"} and "ByteLevel" in (kinds or cuts)
    if byte_level:
        bytes_of = _bytes_of_letters()
    elif steps and set(kinds) <= _PIECE_STEPS and _joins_pieces(steps):
        bytes_of = _bytes_of_pieces(steps)
        leading_space = any(_removes_first_space(step) for step in steps)
    else:
        return None, False
    table = [b""] * size
    for token, i in vocabulary.items():
        table[i] = bytes_of(token)
    for token in described["added_tokens"]:
        text = token["content"]
        table[token["id"]] = text.encode() if byte_level else bytes_of(text)
        if token["special"]:
            table[token["id"]] = b""
    return table, leading_space


def _joins_pieces(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each step of a decoder changes a token in a way that no other token matters to."""
    kinds = [step["type"] for step in steps]
    for k, step in enumerate(steps):
        after_fuse = "Fuse" in kinds[:k]
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String", "")
            if not pattern or after_fuse or "ByteFallback" in kinds[:k]:
                return False
        if step["type"] == "Metaspace" and ("ByteFallback" in kinds[:k] or after_fuse):
            return False
        if step["type"] == "ByteFallback" and after_fuse:
            return False
        if step["type"] == "Strip":
            is_first_space = step["content"] == " " and step["start"] <= 1 and not step["stop"]
            if not is_first_space or (step["start"] and not after_fuse):
                return False
    return True


def _removes_first_space(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step["start"] == 1


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


def _bytes_of_pieces(steps: Sequence[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """A function from a token to its bytes after all steps of the decoder."""

    def bytes_of(token: str) -> bytes:
        for step in steps:
            if step["type"] == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
            elif step["type"] == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                return bytes([int(token[3:5], 16)])
        return token.encode()

    return bytes_of
