"""Tokenizers that come with a checkpoint: a Hugging Face `tokenizer.json` (or the files before it), or the vocabulary inside a GGUF file.

All are run by the `tokenizers` library; a GGUF vocabulary is rewritten as a `tokenizer.json` first. Byte-level BPE (GPT-2, NeoX, Llama 3,
Qwen, SmolLM2) and sentencepiece-like BPE with byte fallback (Llama 2, Mistral) become the same table of bytes.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.openai import OpenAITokenizer, byte_letters

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_SPACE = "\u2581"
_ROLES = "roles.json"  # ours, beside Hugging Face's files: which ids end a text


class PretrainedTokenizer(Tokenizer):
    """`content`: Hugging Face's files by name; `stops`: ids that end a text, the most usual first."""

    kind = "pretrained"

    def __init__(self, content: dict[str, bytes], stops: Sequence[int]):
        import tokenizers

        self._content = {name: content[name] for name in FILES if name in content}
        try:
            self._plain = tokenizers.Tokenizer.from_buffer(content["tokenizer.json"])
            self._read(json.loads(content.get("tokenizer_config.json", b"{}")), content, stops)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception, and damage can be anywhere
            raise UserError(
                f"tokenizer.json is damaged or of an unknown kind: {type(error).__name__}: {str(error)[:200]}"
            ) from None

    def _read(
        self, settings: dict[str, Any], content: dict[str, bytes], stops: Sequence[int]
    ) -> None:
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = (
            True  # the names of control tokens in ordinary text stay text
        )
        self.special = {
            name: _text_of(token)
            for name, token in settings.items()
            if name.endswith("_token") and isinstance(token, str | Mapping)
        }
        added = self._plain.get_added_tokens_decoder()
        self.control = {t.content: i for i, t in added.items() if t.special}
        self._fill_table(added)
        probe = [self._plain.encode("a", add_special_tokens=flag).ids for flag in (True, False)]
        self.prefix = (
            tuple(probe[0][: len(probe[0]) - len(probe[1])])
            if probe[0][-1:] == probe[1][-1:]
            else ()
        )
        if not stops:
            name = _text_of(settings.get("eos_token"))
            stops = (
                [self.control[name]]
                if name in self.control
                else [i for n, i in self.control.items() if n in ("<|endoftext|>", "</s>")]
            )
        if bad := [i for i in stops if not 0 <= i < self.vocab_size]:
            raise UserError(
                f"the end-of-text ids {bad} are outside the tokenizer's {self.vocab_size:,} tokens"
            )
        if not stops:
            raise UserError(
                "the tokenizer names no end-of-text token: set eos_token_id in config.json"
            )
        self.stops, self.eot = tuple(stops), stops[0]
        for i in self.stops:
            self.token_bytes[i] = b""
        template = (
            content.get("chat_template.jinja", b"").decode() or settings.get("chat_template") or ""
        )
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t["name"] == "default"), "")
        if not isinstance(template, str):
            raise UserError(f"the chat template is a {type(template).__name__} instead of a text")
        self.chat_template = template

    @functools.cached_property
    def _control(self) -> Any:
        """A second reader of the same file, to which the names of control tokens in a text are those tokens; only chat templates need it."""
        import tokenizers

        one = tokenizers.Tokenizer.from_buffer(self._content["tokenizer.json"])
        one.no_truncation()
        one.no_padding()
        return one

    def _fill_table(self, added: dict[int, Any]) -> None:
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        if max(vocabulary.values(), default=0) > 1 << 24:
            raise UserError(
                f"tokenizer.json gives a token the id {max(vocabulary.values()):,}: it is damaged"
            )
        self.token_bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
        letters = str.maketrans(
            {chr(b): "\uffff" for b in range(256)}
            | {letter: chr(b) for letter, b in byte_letters().items()}
        )
        byte_level = "ByteLevel(" in f"{self._plain.decoder} {self._plain.pre_tokenizer}"
        for token, i in vocabulary.items():
            if i in added:
                self.token_bytes[i] = b"" if added[i].special else added[i].content.encode()
            elif byte_level:
                try:
                    self.token_bytes[i] = token.translate(letters).encode("latin-1")
                except UnicodeEncodeError:  # not written in that alphabet
                    self.token_bytes[i] = token.encode()
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                self.token_bytes[i] = bytes([int(token[3:5], 16)])
            else:
                self.token_bytes[i] = token.replace(_SPACE, " ").encode()
        self.leading_space = (
            not byte_level
            and self.decode_bytes(self._plain.encode("a", add_special_tokens=False).ids) == b" a"
        )

    def files(self) -> dict[str, bytes]:
        return {**self._content, _ROLES: json.dumps({"stops": list(self.stops)}).encode()}

    @classmethod
    def from_files(cls, content: dict[str, bytes]) -> PretrainedTokenizer:
        return cls(content, json.loads(content[_ROLES])["stops"])

    @classmethod
    def from_folder(cls, folder: Path, stops: Sequence[int]) -> PretrainedTokenizer | None:
        """The tokenizer beside a Hugging Face checkpoint; None where the folder has none."""
        content = {
            name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()
        }
        try:
            content |= cls._rewritten(content)
        except UserError:
            raise
        except Exception as error:  # JSON, UTF-8, and whatever the libraries raise
            raise UserError(
                f"{folder}: the tokenizer's files are damaged: {type(error).__name__}: {str(error)[:150]}"
            ) from None
        return cls(content, stops) if "tokenizer.json" in content else None

    @staticmethod
    def _rewritten(content: dict[str, bytes]) -> dict[str, bytes]:
        """A `tokenizer.json` made of the older files, where there is none."""
        if "tokenizer.json" not in content:
            if "vocab.json" in content and "merges.txt" in content:
                merges = [
                    line
                    for line in content["merges.txt"].decode().splitlines()
                    if line and not line.startswith("#version")
                ]
                return {
                    "tokenizer.json": byte_level_json(
                        json.loads(content["vocab.json"]),
                        merges,
                        control=["<|endoftext|>"],
                        digits=False,
                    )
                }
            if "tokenizer.model" in content:
                import sentencepiece

                sp = sentencepiece.SentencePieceProcessor(model_proto=content["tokenizer.model"])
                ids = range(sp.vocab_size())
                kinds = [
                    3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else 1
                    for i in ids
                ]
                return {
                    "tokenizer.json": pieces_json(
                        [sp.id_to_piece(i) for i in ids],
                        [sp.get_score(i) for i in ids],
                        kinds,
                        bos=sp.bos_id(),
                    )
                }
        return {}

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        for encoded in self._plain.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoded.ids

    def encode_template(self, text: str, guard: str = "") -> list[int]:
        if guard and guard in text:
            return super().encode_template(text, guard)
        return self._control.encode(text, add_special_tokens=False).ids


def _text_of(token: Any) -> str:
    return token.get("content", "") if isinstance(token, Mapping) else token or ""


def byte_level_json(
    vocabulary: dict[str, int],
    merges: Sequence[str],
    *,
    control: Sequence[str],
    digits: bool,
    pattern: str = "",
    bos: int = -1,
    whole: Sequence[str] = (),
) -> bytes:
    """A `tokenizer.json` of byte-level BPE. control: tokens that text never becomes; whole: tokens that are never cut. `digits`: each digit apart; `pattern`: the rule that cuts text, where it is not GPT-2's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    result = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[(m.partition(" ")[0], m.partition(" ")[2]) for m in merges]
        )
    )
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern:
        cuts.append(pre_tokenizers.Split(Regex(pattern), "isolated", invert=False))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern))
    result.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in control if name in vocabulary]
    )
    result.add_tokens(
        [AddedToken(name, special=False, normalized=False) for name in whole if name in vocabulary]
    )
    return _with_prefix(result, next((name for name, i in vocabulary.items() if i == bos), ""), bos)


def pieces_json(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, bos: int
) -> bytes:
    """A `tokenizer.json` of sentencepiece-like BPE with byte fallback. kinds: 1 text, 2 unknown, 3 control, 4 user-defined, 6 byte.

    Sentencepiece merges the pair whose union has the best score: each way to cut a piece into two known ones is such a merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted((i for i, kind in enumerate(kinds) if kind == 1), key=lambda i: -scores[i]):
        piece = pieces[i]
        cuts = [
            (piece[:k], piece[k:])
            for k in range(1, len(piece))
            if piece[:k] in ids and piece[k:] in ids
        ]
        merges += sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    unknown = next((p for p, kind in zip(pieces, kinds, strict=True) if kind == 2), None)
    result = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    result.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    result.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    result.add_special_tokens(
        [
            AddedToken(pieces[i], special=True, normalized=False)
            for i, kind in enumerate(kinds)
            if kind in (2, 3)
        ]
    )
    return _with_prefix(result, pieces[bos] if bos >= 0 else "", bos)


def _with_prefix(result: Any, name: str, bos: int) -> bytes:
    """The tokenizer's JSON, with the token `name` before every text where there is one."""
    if name:
        from tokenizers import processors

        result.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=None, special_tokens=[(name, bos)]
        )
    return result.to_str().encode()


def of_gpt2(tokenizer: OpenAITokenizer) -> PretrainedTokenizer:
    """GPT-2's tokenizer in Hugging Face's form."""
    letters = {b: letter for letter, b in byte_letters().items()}
    shown = ["".join(letters[b] for b in token) for token in tokenizer.token_bytes[:-1]]
    ids = {token: i for i, token in enumerate(shown)} | {"<|endoftext|>": tokenizer.eot}
    merges = [_last_merge(token, ids) for token in shown if len(token) > 1]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    content = {
        "tokenizer.json": byte_level_json(ids, merges, control=["<|endoftext|>"], digits=False)
    }
    return PretrainedTokenizer(
        {**content, "tokenizer_config.json": json.dumps(settings, indent=1).encode()},
        [tokenizer.eot],
    )


def _last_merge(token: str, ids: Mapping[str, int]) -> str:
    """The pair that made `token`: merging its letters in order of rank until two parts are left."""
    parts = list(token)
    while len(parts) > 2:
        ranks = [ids.get(a + b, len(ids)) for a, b in itertools.pairwise(parts)]
        best = ranks.index(min(ranks))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return " ".join(parts)
