"""What of a tokenizer.json is lost in another one that was rebuilt from the fields of a GGUF file.

The two are compared part by part, each in one spelling, so that no list of known tokenizers is
needed: what is not equal is named.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.checkpoints.gguf_vocabulary import BYTE
from gptjax.core.characters import shorten
from gptjax.tokenizer.added_tokens import Added
from gptjax.tokenizer.file_keys import read_sentencepiece_fields
from gptjax.tokenizer.library import steps_of
from gptjax.tokenizer.pieces import SPACE

_FLAGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def find_differences(
    source: Mapping[str, Any], rebuilt: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """(what is lost, notes on what stays without effect on most texts), both in words."""
    lost: list[str] = []
    notes: list[str] = []
    model, other = source["model"], rebuilt["model"]
    for flag in _FLAGS:
        if (model.get(flag) or None) != (other.get(flag) or None):
            lost.append(f"{flag} = {json.dumps(model.get(flag))}")
    lost += _different_vocabulary(source, rebuilt)
    lost += _different_added_tokens(source, rebuilt)
    if other["byte_fallback"]:
        lost += _different_pieces(source, rebuilt)
        steps, expected = _piece_steps(source), _piece_steps(rebuilt)
    else:
        steps, expected = steps_of(source.get("normalizer")), []
        if only_composes(source):
            steps = []
            notes.append(
                "the tokenizer normalises text to NFC, which a GGUF file cannot say: text with "
                "characters that are not composed is cut otherwise"
            )
    if steps != expected:
        lost.append(f"the normalisation {_named(steps)} instead of {_named(expected)}")
    if _pairs(model) != _pairs(other):
        lost.append("merges that scores of pieces cannot say")
    return lost, notes


_KINDS = {1: "a Unigram vocabulary", 3: "a vocabulary of words", 4: "a vocabulary of characters"}


def different_model_file(
    model: bytes,
    types: Sequence[int],
    settings: Mapping[str, Any],
    added: Sequence[Added],
    *,
    prefix: bool,
) -> list[str]:
    """What of a tokenizer.model is lost among the fields of a file, in words.

    types: of its pieces and added tokens in GGUF. prefix: a space is written before the first word.
    """
    fields = read_sentencepiece_fields(model)
    kind = fields.get("trainer_spec.model_type", 1)
    if kind in _KINDS:
        return [_KINDS[kind]]
    lost = []
    if types.count(BYTE) < 256:
        lost.append(f"no token for {256 - types.count(BYTE)} of the 256 bytes")
    if fields.get("normalizer_spec.precompiled_charsmap"):
        lost.append("a normalisation of characters (precompiled_charsmap)")
    if fields.get("normalizer_spec.remove_extra_whitespaces", True):
        lost.append("remove_extra_whitespaces, without which white space is kept")
    if not fields.get("normalizer_spec.escape_whitespaces", True):
        lost.append("escape_whitespaces = false")
    if prefix and not settings.get("legacy", True):
        lost.append("legacy = false: no space after a control token")
    if prefix and fields.get("trainer_spec.user_defined_symbols"):
        lost.append("user-defined symbols that no space is written after")
    for token in added:
        for flag in ("single_word", "lstrip", "rstrip"):
            if getattr(token, flag):
                lost.append(f"{flag} = true of the token {token.content!r}")
    return lost if len(lost) < 4 else [*lost[:3], f"{len(lost) - 3} more like that"]


def only_composes(described: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json normalises texts to NFC and does nothing else to them."""
    return steps_of(described.get("normalizer")) == [{"type": "NFC"}]


def _named(steps: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(_short(step) for step in steps) or "none"


def _short(step: Mapping[str, Any]) -> str:
    details = {k: v for k, v in step.items() if k != "type"}
    text = step["type"] + (f" {json.dumps(details, ensure_ascii=False)}" if details else "")
    return shorten(text, 70)


def _piece_steps(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is done to a text before sentencepiece's merging, pre-tokenizers included."""
    steps = steps_of(described.get("normalizer"))
    for step in steps_of(described.get("pre_tokenizer")):
        never_splits = not step.get("split", True) and step.get("prepend_scheme") == "never"
        if step["type"] == "Metaspace" and never_splits and step["replacement"] == SPACE:
            steps.append(_REPLACE)
        # no space is left to split at once all are replaced
        elif step["type"] != "Split" or step["pattern"] != {"String": " "} or _REPLACE not in steps:
            steps.append(step)
    return steps


def _ids(described: Mapping[str, Any]) -> dict[str, int]:
    ids = dict(described["model"]["vocab"])
    return ids | {token["content"]: token["id"] for token in described.get("added_tokens", [])}


def _different_vocabulary(source: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> list[str]:
    ids, others = _ids(source), _ids(rebuilt)
    different = [token for token in ids if ids[token] != others.get(token)]
    return [f"the token {different[0]!r}, whose id is taken"] if different else []


def _different_added_tokens(source: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> list[str]:
    """Flags of added tokens that their type in GGUF does not imply."""
    others = {token["id"]: token for token in rebuilt["added_tokens"]}
    own = {token["id"]: token for token in source.get("added_tokens", [])}
    normalizes = bool(source.get("normalizer"))
    lost = []
    for i, token in own.items():
        name, other = token["content"], others[i]
        for flag in ("single_word", "lstrip", "rstrip", "special"):
            if bool(token.get(flag)) != other[flag]:
                value = str(bool(token.get(flag))).lower()
                lost.append(f"{flag} = {value} of the token {name!r}")
        is_same = only_composes(source) and unicodedata.normalize("NFC", name) == name
        if token.get("normalized") and normalizes and not is_same:
            lost.append(f"normalized = true of the token {name!r}")
    names = [token["content"] for i, token in others.items() if i not in own]
    if names:
        lost.append(f"the plain token {names[0]!r}, which GGUF's readers match before all others")
    return lost if len(lost) < 4 else [*lost[:3], f"{len(lost) - 3} more like that"]


def _different_pieces(source: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> list[str]:
    vocabulary = source["model"]["vocab"]
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    return [f"no token for {len(missing)} of the 256 bytes"] if missing else []


def _pairs(model: Mapping[str, Any]) -> Any:
    """The merges, those that make the same piece together: their order is that of the pieces."""
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not model.get("byte_fallback"):
        return pairs
    by_piece: dict[str, set[tuple[str, str]]] = {}
    for first, second in pairs:
        by_piece.setdefault(first + second, set()).add((first, second))
    return list(by_piece.items())
