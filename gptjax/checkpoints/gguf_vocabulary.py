"""The tokenizer in a GGUF file, as a `PretrainedTokenizer`.

Its fields become a `tokenizer.json` that cuts text as llama.cpp does with the same fields.
Byte-level BPE ("gpt2") and sentencepiece's BPE ("llama") are known; the pre-tokenizers of the first
are in gguf_pre_tokenizers.py. gguf_write_vocabulary.py goes the other way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.checkpoints import gguf_pre_tokenizers
from gptjax.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from gptjax.config.errors import UserError, unknown_name
from gptjax.tokenizer import template_files
from gptjax.tokenizer.pieces import SPACE
from gptjax.tokenizer.pretrained import PretrainedTokenizer

Fields = Mapping[str, Any]

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
_FILLER = re.compile(r"\[PAD\d+\]")  # stands for an id that no token has

# llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Tokens that llama.cpp takes for control tokens by their names, whatever type the file gives them.
_CONTROL_NAMES = re.compile(
    r"</s>|<eos>|<EOT>|_<EOT>|\[EOT\]|\[EOS\]|<turn\|>|<\|tool_response>|\[e~\[|<end_of_turn>"
    r"|<end_of_utterance>|<｜end▁of▁sentence｜>"
    r"|<\|(eot_id|im_end|end|return|call|flush|calls|endoftext|eom_id|end_of_text)\|>"
)

# {token in tokenizer_config.json: the id's name in GGUF}
SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # spelled so in the format
    "mask_token": "mask",
}
ENDS = ("eos", "eot", "eom")

# What llama.cpp takes where a file names no id.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {}}


# ---- Reading


def read_tokenizer(meta: Fields, path: Path) -> PretrainedTokenizer | None:
    """The tokenizer of a file with these fields, or None where it has none. Raises UserError."""
    model, tokens = meta.get(PREFIX + "model"), meta.get(PREFIX + "tokens")
    if model in (None, "no_vocab", "none") or not tokens:
        return None
    try:
        contents = {"tokenizer.json": normal_json(tokenizer_json(meta))}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: its vocabulary is damaged: {str(error)[:150]}") from None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    for name, gguf_name in SPECIAL_TOKENS.items():
        i = _token_id(meta, gguf_name)
        if i >= 0 and (gguf_name != "unknown" or f"{PREFIX}{gguf_name}_token_id" in meta):
            settings[name] = tokens[i]
    templates = _templates(meta, path)
    if len(templates) > 1:
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    elif "default" in templates:
        contents[template_files.FILE] = templates["default"].encode()
    contents["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
    eos_ids = [_token_id(meta, name) for name in ENDS]
    return PretrainedTokenizer(contents, list(dict.fromkeys(i for i in eos_ids if i >= 0)))


def read_special_ids(meta: Fields) -> dict[str, int]:
    """The ids that config.json would name, of those that the file names."""
    names = {"bos_token_id": "bos", "pad_token_id": "padding"}
    ids = {name: _token_id(meta, gguf_name) for name, gguf_name in names.items()}
    return {name: i for name, i in ids.items() if i >= 0}


def _token_id(meta: Fields, name: str) -> int:
    """The id of a role, or -1 where there is none."""
    model = meta[PREFIX + "model"]
    default = _DEFAULT_IDS.get(model, {}).get(name, -1)
    i = meta.get(f"{PREFIX}{name}_token_id", default)
    return i if 0 <= i < len(meta[PREFIX + "tokens"]) else -1


def _templates(meta: Fields, path: Path) -> dict[str, str]:
    """The chat templates by name, "default" first."""
    templates = {"default": meta[TEMPLATE]} if meta.get(TEMPLATE) else {}
    for key, text in meta.items():
        if key.startswith(TEMPLATE + "."):
            templates[key.removeprefix(TEMPLATE + ".")] = text
    for name, text in templates.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the chat template {name!r} is no text")
    return templates


def tokenizer_json(meta: Fields) -> dict[str, Any]:
    """The fields as a tokenizer.json that cuts text as llama.cpp does. Raises UserError."""
    model = meta[PREFIX + "model"]
    if model not in VOCABULARIES:
        kinds = "t5: Unigram, bert: WordPiece, rwkv and plamo2: of their own"
        raise UserError(
            f"{unknown_name('GGUF vocabulary', str(model), list(VOCABULARIES))} ({kinds})"
        )
    tokens = meta[PREFIX + "tokens"]
    types = meta.get(PREFIX + "token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{len(types):,} token types for {len(tokens):,} tokens: it is damaged")
    types = list(types)
    for i, token in enumerate(tokens):
        if _CONTROL_NAMES.fullmatch(token):
            types[i] = CONTROL
    described, bos_by_default = VOCABULARIES[model](meta, tokens, types)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types, str(meta.get("general.name", ""))),
        "post_processor": _post_processor(meta, bos_by_default),
        **described,
    }


def normal_json(described: Mapping[str, Any]) -> bytes:
    """As the library writes it, which begins the fingerprint of a run's tokenizer."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(described)).to_str().encode()


def _added_tokens(tokens: Sequence[str], types: Sequence[int], name: str) -> list[dict[str, Any]]:
    """Tokens that are matched before anything else is done to a text."""
    strips = strips_by_name(name)
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
            flags["rstrip"] = strips and token not in keeps
            added.append({"id": i, "content": token, **flags, "special": kind != USER_DEFINED})
    return added


def strips_by_name(name: str) -> bool:
    """Whether tokens swallow the white space after them: llama.cpp goes by the model's name."""
    return "phi-3" in name.lower() or "phi3" in name.lower()


def _post_processor(meta: Fields, bos_by_default: bool) -> dict[str, Any] | None:
    """What is written before and after every text; None for nothing."""
    tokens = meta[PREFIX + "tokens"]
    template: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for name, by_default, at in (("bos", bos_by_default, 0), ("eos", False, 1)):
        if not meta.get(f"{PREFIX}add_{name}_token", by_default):
            continue
        i = _token_id(meta, name)
        if i < 0 and f"{PREFIX}add_{name}_token" in meta:
            raise UserError(
                f"add_{name}_token is set, and {name}_token_id names no token of the vocabulary"
            )
        if i >= 0:
            template.insert(at * len(template), {"SpecialToken": {"id": tokens[i], "type_id": 0}})
            special[tokens[i]] = {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
    if not special:
        return None
    kind = {"type": "TemplateProcessing", "single": template, "pair": []}
    return {**kind, "special_tokens": special}


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Any], **flags: Any) -> dict[str, Any]:
    """The `model` of a tokenizer.json."""
    absent = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    contents = {"vocab": dict(vocabulary), "merges": list(merges)}
    return {"type": "BPE", **absent, **off, **flags, **contents}


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """{token: id}, without those that stand for ids which no token has."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if types[i] == UNUSED and _FILLER.fullmatch(token):
            continue
        if token in ids:
            raise UserError(f"the tokens {ids[token]} and {i} are both {token!r}: it is damaged")
        ids[token] = i
    return ids


def _byte_level(
    meta: Fields, tokens: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, Any], bool]:
    """(BPE over letters that stand for bytes, whether texts begin with bos by default)."""
    name = meta.get(PREFIX + "pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer.ggml.pre: {unknown_name('pre-tokenizer', str(name), list(PRE_TOKENIZERS))}"
        )
    row: PreTokenizer = PRE_TOKENIZERS[name]
    if PREFIX + "merges" not in meta:
        raise UserError("tokenizer.ggml.merges is missing, so text cannot be cut")
    merges = []
    for merge in meta[PREFIX + "merges"]:
        at = merge.find(" ", 1)
        if at < 0:
            raise UserError(f"the merge {merge!r} is no pair of tokens: it is damaged")
        merges.append([merge[:at], merge[at + 1 :]])
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    described = {
        "normalizer": None,
        "pre_tokenizer": gguf_pre_tokenizers.steps_to_json(row.patterns),
        "decoder": {**decoder, "use_regex": True},
        "model": _bpe(_vocabulary(tokens, types), merges, ignore_merges=row.ignore_merges),
    }
    return described, row.bos


def _pieces(
    meta: Fields, tokens: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, Any], bool]:
    """(sentencepiece's BPE with bytes, True: bos is written unless the file says otherwise)."""
    scores = meta.get(PREFIX + "scores") or []
    if len(scores) < len(tokens):
        raise UserError(f"{len(scores):,} scores for {len(tokens):,} tokens: it is damaged")
    ids = _vocabulary(tokens, types)
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    prefix = meta.get(PREFIX + "add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    flags = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    described = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(ids, _merges_by_score(tokens, scores, types, ids), **flags),
    }
    return described, True


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], ids: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Sentencepiece joins the two pieces whose union has the best score: each way to cut a piece
    into two known ones is such a merge."""
    results = [i for i, kind in enumerate(types) if kind in (NORMAL, UNUSED) and tokens[i] in ids]
    merges: list[tuple[str, str]] = []
    for i in sorted(results, key=lambda i: -scores[i]):
        piece = tokens[i]
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(first, second) for first, second in cuts if first in ids and second in ids]
        merges += sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    return merges


# {tokenizer.ggml.model: what makes a tokenizer.json of it}
VOCABULARIES: dict[
    str, Callable[[Fields, Sequence[str], Sequence[int]], tuple[dict[str, Any], bool]]
] = {"gpt2": _byte_level, "llama": _pieces}
