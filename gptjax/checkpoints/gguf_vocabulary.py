"""The tokenizer in a GGUF file, as a `PretrainedTokenizer` and back (byte-level BPE only)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError, unknown_name
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.pretrained import PretrainedTokenizer
from gptjax.tokenizer.rewriting import byte_level_json, pieces_json

# llama.cpp's types of tokens.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How text is cut before byte-level merging, by GGUF's name of the pre-tokenizer:
# (whether each digit is cut off first, the pattern of a piece or "" for GPT-2's).
_PRE_TOKENIZERS: dict[str, tuple[bool, str]] = {
    "default": (False, ""),
    "gpt-2": (False, ""),
    "smollm": (True, ""),
    "llama-bpe": (False, _LLAMA3),
    "qwen2": (False, _LLAMA3.replace("{1,3}", "")),
}

# {token in tokenizer_config.json: the id's name in GGUF}
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def read_tokenizer(meta: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer of a file with these fields, or None where it has none. Raises UserError."""
    tokens = meta.get("tokenizer.ggml.tokens")
    if not meta.get("tokenizer.ggml.model") or not tokens:
        return None
    try:
        data = _tokenizer_json(meta, path)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: its vocabulary is damaged: {str(error)[:150]}") from None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    for name, gguf_name in _SPECIAL_TOKENS.items():
        i = meta.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if i is not None and 0 <= i < len(tokens):
            settings[name] = tokens[i]
    contents = {
        "tokenizer.json": data,
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }
    if template := meta.get("tokenizer.chat_template"):
        contents["chat_template.jinja"] = template.encode()
    eos_ids = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return PretrainedTokenizer(
        contents, list(dict.fromkeys(int(i) for i in eos_ids if i is not None))
    )


def _tokenizer_json(meta: Mapping[str, Any], path: Path) -> bytes:
    """The vocabulary as a tokenizer.json of Hugging Face."""
    kind, tokens = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.tokens"]
    types = list(meta.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens))
    bos = -1
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = meta.get("tokenizer.ggml.bos_token_id", -1)
    if kind == "llama":
        return pieces_json(tokens, meta["tokenizer.ggml.scores"], types, bos=bos)
    if kind != "gpt2":
        problem = unknown_name("GGUF vocabulary", str(kind), ["gpt2", "llama"])
        raise UserError(f"{path}: {problem}")
    pre_tokenizer = meta.get("tokenizer.ggml.pre", "default")
    if pre_tokenizer not in _PRE_TOKENIZERS:
        problem = unknown_name("pre-tokenizer", str(pre_tokenizer), list(_PRE_TOKENIZERS))
        raise UserError(f"{path}: {problem}")
    digits, pattern = _PRE_TOKENIZERS[pre_tokenizer]
    typed = list(zip(tokens, types, strict=True))
    return byte_level_json(
        {token: i for i, token in enumerate(tokens)},
        meta["tokenizer.ggml.merges"],
        control=[token for token, t in typed if t == _CONTROL],
        digits=digits,
        pattern=pattern,
        bos=bos,
        uncut=[token for token, t in typed if t == _USER_DEFINED],
    )


def write_vocabulary(writer: Any, tokenizer: PretrainedTokenizer, size: int) -> None:
    """Adds the tokenizer's fields to a `gguf.GGUFWriter`.

    size: tokens of the model; ids past the tokenizer's are written as unused. Raises UserError for
    a vocabulary that is not a byte-level BPE.
    """
    described = json.loads(tokenizer.files()["tokenizer.json"])
    if described["model"].get("type") != "BPE" or tokenizer.leading_space:
        raise UserError("GGUF export writes byte-level BPE vocabularies only: use --format=hf")
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    words = {i: word for word, i in described["model"]["vocab"].items()}
    words |= {i: token["content"] for i, token in added.items()}
    types = []
    for i in range(size):
        if i not in words:
            types.append(_UNUSED)
        elif i not in added:
            types.append(_NORMAL)
        else:
            types.append(_CONTROL if added[i]["special"] else _USER_DEFINED)
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer_name(described))
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    # GGUF has three fields for tokens that end a text
    add_id = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, eos_id in zip(add_id, tokenizer.eos_ids, strict=False):
        add(eos_id)
    if tokenizer.bos_ids:
        writer.add_bos_token_id(tokenizer.bos_ids[0])
    writer.add_add_bos_token(bool(tokenizer.bos_ids))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer_name(described: Mapping[str, Any]) -> str:
    """GGUF's name for how a tokenizer.json cuts text: of those in `_PRE_TOKENIZERS`."""
    cuts = json.dumps(described.get("pre_tokenizer"))
    if "Digits" in cuts:
        return "smollm"
    if "{1,3}" in cuts:
        return "llama-bpe"
    return "qwen2" if "Split" in cuts else "gpt-2"
