"""A `tokenizer.json` made of the files that Hugging Face folders had before it.

`vocab.json` with `merges.txt` (byte-level BPE), or `vocab.txt` (WordPiece). How text is cut stands
in none of them: the `tokenizer_class` says it. To add a class, add a row to BYTE_LEVEL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.tokenizer import file_keys
from gptjax.tokenizer.added_tokens import read_added, roles
from gptjax.tokenizer.library import complete

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """How a class cuts text; pattern: "" is GPT-2's. nfc: whether characters are composed first."""

    pattern: str = ""
    nfc: bool = False


BYTE_LEVEL = {
    "GPT2Tokenizer": _Cuts(),
    "CodeGenTokenizer": _Cuts(),
    "GPTNeoXTokenizer": _Cuts(nfc=True),
    "Qwen2Tokenizer": _Cuts(QWEN2, nfc=True),
}
_WORD_PIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
SENTENCEPIECE = (
    *("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer"),
    "TokenizersBackend",
)

# The class where no file names one, by model_type.
_CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}


def tokenizer_class(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class that cuts the text, without "Fast", or "" where nothing names one.

    config: config.json.
    """
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    name = name or _CLASSES.get(str(config.get("model_type")), "")
    return str(name).removesuffix("Fast")


def rewrite(content: Mapping[str, bytes], settings: Mapping[str, Any], name: str) -> bytes | None:
    """The `tokenizer.json` with all added tokens, or None where these files are not here.

    name: the tokenizer's class. Raises UserError for a class that is not known.
    """
    if "vocab.json" in content and "merges.txt" in content:
        rewritten = _byte_level(content, settings, name)
    elif "vocab.txt" in content and "tokenizer.model" not in content:
        rewritten = _word_piece(content, settings, name)
    else:
        return None
    file_keys.check_settings(content, settings)
    described = json.loads(rewritten)
    completed = complete(rewritten, read_added(content, settings))
    if settings.get("add_bos_token"):
        completed["post_processor"] = _first_token(completed, settings)
    if completed == described:
        return rewritten
    return json.dumps(completed, ensure_ascii=False).encode()


def _first_token(described: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A post-processor that writes the first token before a text. Raises UserError."""
    name = roles(settings).get("bos_token", "<|endoftext|>")
    ids = {token["content"]: token["id"] for token in described["added_tokens"]}
    if name not in ids:
        raise UserError(
            f"tokenizer_config.json asks for {name!r} before every text (add_bos_token), and the "
            "vocabulary has no such token"
        )
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": name, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]}},
    }


def _byte_level(content: Mapping[str, bytes], settings: Mapping[str, Any], name: str) -> bytes:
    vocabulary = json.loads(content["vocab.json"])
    name = name or "GPT2Tokenizer"
    if name not in BYTE_LEVEL:
        raise UserError(_unknown_class(name, "vocab.json and merges.txt", tuple(BYTE_LEVEL)))
    cuts = BYTE_LEVEL[name]
    lines = content["merges.txt"].decode().splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return byte_level_json(
        vocabulary,
        merges,
        control=["<|endoftext|>"],
        pattern=cuts.pattern,
        nfc=cuts.nfc,
        prefix_space=bool(settings.get("add_prefix_space")),
    )


def byte_level_json(
    vocabulary: dict[str, int],
    merges: Sequence[str],
    *,
    control: Sequence[str],
    pattern: str = "",
    nfc: bool = False,
    prefix_space: bool = False,
) -> bytes:
    """A `tokenizer.json` of byte-level BPE.

    control: tokens that text never becomes. pattern: the rule that cuts text, where it is not
    GPT-2's. nfc: whether characters are composed first. prefix_space: whether a space is written
    before every text.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        pairs.append((first, second))
    result = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    if nfc:
        result.normalizer = normalizers.NFC()
    cuts: list[Any] = []
    if pattern:
        cuts.append(pre_tokenizers.Split(Regex(pattern), "isolated", invert=False))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not pattern))
    result.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in control if name in vocabulary]
    )
    return result.to_str().encode()


def _word_piece(content: Mapping[str, bytes], settings: Mapping[str, Any], name: str) -> bytes:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name = name or "BertTokenizer"
    if name not in _WORD_PIECE:
        raise UserError(_unknown_class(name, "vocab.txt", _WORD_PIECE))
    vocabulary = {line: i for i, line in enumerate(content["vocab.txt"].decode().splitlines())}
    names = roles(settings)
    unknown = names.get("unk_token", "[UNK]")
    result = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    result.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.decoder = decoders.WordPiece(prefix="##")
    ends = [names.get("cls_token", "[CLS]"), names.get("sep_token", "[SEP]")]
    others = [names.get("pad_token", "[PAD]"), names.get("mask_token", "[MASK]")]
    result.add_special_tokens([t for t in (unknown, *ends, *others) if t in vocabulary])
    if all(token in vocabulary for token in ends):
        result.post_processor = processors.TemplateProcessing(
            single=f"{ends[0]} $A {ends[1]}",
            pair=None,
            special_tokens=[(token, vocabulary[token]) for token in ends],
        )
    return result.to_str().encode()


def _unknown_class(name: str, described: str, known: tuple[str, ...]) -> str:
    return (
        f"tokenizer_class = {name!r}: how it cuts text is not known for {described} "
        f"(known: {', '.join(known)}).\nSave the tokenizer with transformers "
        "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), which writes a "
        "tokenizer.json"
    )


def require_sentencepiece_class(name: str) -> None:
    """Refuses a class whose ids are not those in tokenizer.model. Raises UserError."""
    if name and name not in SENTENCEPIECE:
        raise UserError(_unknown_class(name, "tokenizer.model", SENTENCEPIECE))
