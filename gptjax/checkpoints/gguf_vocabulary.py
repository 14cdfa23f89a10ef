"""The tokenizer in a GGUF file, as a `PretrainedTokenizer` and back.

Its fields become a `tokenizer.json` that cuts text as llama.cpp does with the same fields. Writing
goes the other way: `vocabulary_fields` takes the fields that fit best, makes a tokenizer.json of
them as a reader would, and refuses by name whatever then differs from the tokenizer it was given.
Byte-level BPE ("gpt2") and sentencepiece's BPE ("llama") are known; the pre-tokenizers of the first
are in gguf_pre_tokenizers.py, the comparison is in gguf_differences.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.checkpoints import gguf_pre_tokenizers
from gptjax.checkpoints.gguf_differences import find_differences
from gptjax.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from gptjax.config.errors import UserError, unknown_name
from gptjax.core import cli
from gptjax.tokenizer.pretrained import PretrainedTokenizer

Fields = Mapping[str, Any]

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "\u2581"
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
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # spelled so in the format
    "mask_token": "mask",
}
_ENDS = ("eos", "eot", "eom")

# What llama.cpp takes where a file names no id.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {}}


# ---- Reading


def read_tokenizer(meta: Fields, path: Path) -> PretrainedTokenizer | None:
    """The tokenizer of a file with these fields, or None where it has none. Raises UserError."""
    model, tokens = meta.get(_PREFIX + "model"), meta.get(_PREFIX + "tokens")
    if model in (None, "no_vocab", "none") or not tokens:
        return None
    try:
        contents = {"tokenizer.json": _normal_json(tokenizer_json(meta))}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: its vocabulary is damaged: {str(error)[:150]}") from None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    for name, gguf_name in _SPECIAL_TOKENS.items():
        i = _token_id(meta, gguf_name)
        if i >= 0 and (gguf_name != "unknown" or f"{_PREFIX}{gguf_name}_token_id" in meta):
            settings[name] = tokens[i]
    templates = _templates(meta, path)
    if len(templates) > 1:
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    elif "default" in templates:
        contents["chat_template.jinja"] = templates["default"].encode()
    contents["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
    eos_ids = [_token_id(meta, name) for name in _ENDS]
    return PretrainedTokenizer(contents, list(dict.fromkeys(i for i in eos_ids if i >= 0)))


def read_special_ids(meta: Fields) -> dict[str, int]:
    """The ids that config.json would name, of those that the file names."""
    names = {"bos_token_id": "bos", "pad_token_id": "padding"}
    ids = {name: _token_id(meta, gguf_name) for name, gguf_name in names.items()}
    return {name: i for name, i in ids.items() if i >= 0}


def _token_id(meta: Fields, name: str) -> int:
    """The id of a role, or -1 where there is none."""
    model = meta[_PREFIX + "model"]
    default = _DEFAULT_IDS.get(model, {}).get(name, -1)
    i = meta.get(f"{_PREFIX}{name}_token_id", default)
    return i if 0 <= i < len(meta[_PREFIX + "tokens"]) else -1


def _templates(meta: Fields, path: Path) -> dict[str, str]:
    """The chat templates by name, "default" first."""
    templates = {"default": meta[_TEMPLATE]} if meta.get(_TEMPLATE) else {}
    for key, text in meta.items():
        if key.startswith(_TEMPLATE + "."):
            templates[key.removeprefix(_TEMPLATE + ".")] = text
    for name, text in templates.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the chat template {name!r} is no text")
    return templates


def tokenizer_json(meta: Fields) -> dict[str, Any]:
    """The fields as a tokenizer.json that cuts text as llama.cpp does. Raises UserError."""
    model = meta[_PREFIX + "model"]
    if model not in VOCABULARIES:
        kinds = "t5: Unigram, bert: WordPiece, rwkv and plamo2: of their own"
        raise UserError(
            f"{unknown_name('GGUF vocabulary', str(model), list(VOCABULARIES))} ({kinds})"
        )
    tokens = meta[_PREFIX + "tokens"]
    types = meta.get(_PREFIX + "token_type") or [NORMAL] * len(tokens)
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


def _normal_json(described: Mapping[str, Any]) -> bytes:
    """As the library writes it, which begins the fingerprint of a run's tokenizer."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(described)).to_str().encode()


def _added_tokens(tokens: Sequence[str], types: Sequence[int], name: str) -> list[dict[str, Any]]:
    """Tokens that are matched before anything else is done to a text."""
    # llama.cpp goes by the model's name: no field says it
    strips = "phi-3" in name.lower() or "phi3" in name.lower()
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
            flags["rstrip"] = strips and token not in keeps
            added.append({"id": i, "content": token, **flags, "special": kind != USER_DEFINED})
    return added


def _post_processor(meta: Fields, bos_by_default: bool) -> dict[str, Any] | None:
    """What is written before and after every text; None for nothing."""
    tokens = meta[_PREFIX + "tokens"]
    template: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for name, by_default, at in (("bos", bos_by_default, 0), ("eos", False, 1)):
        if not meta.get(f"{_PREFIX}add_{name}_token", by_default):
            continue
        i = _token_id(meta, name)
        if i < 0 and f"{_PREFIX}add_{name}_token" in meta:
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
    name = meta.get(_PREFIX + "pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer.ggml.pre: {unknown_name('pre-tokenizer', str(name), list(PRE_TOKENIZERS))}"
        )
    row: PreTokenizer = PRE_TOKENIZERS[name]
    if _PREFIX + "merges" not in meta:
        raise UserError("tokenizer.ggml.merges is missing, so text cannot be cut")
    merges = []
    for merge in meta[_PREFIX + "merges"]:
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
    scores = meta.get(_PREFIX + "scores") or []
    if len(scores) < len(tokens):
        raise UserError(f"{len(scores):,} scores for {len(tokens):,} tokens: it is damaged")
    ids = _vocabulary(tokens, types)
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    prefix = meta.get(_PREFIX + "add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
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


# ---- Writing


def write_vocabulary(writer: Any, tokenizer: PretrainedTokenizer, size: int, name: str) -> None:
    """Adds the tokenizer's fields to a `gguf.GGUFWriter`.

    size: tokens of the model; ids past the tokenizer's are written as unused. name: the model's,
    by which llama.cpp tells one family. Raises UserError for what the format cannot hold.
    """
    fields = vocabulary_fields(tokenizer, size, name)
    adders = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.name":
            adders[type(value)](key, value)


def vocabulary_fields(tokenizer: PretrainedTokenizer, size: int, name: str) -> dict[str, Any]:
    """The fields of a file that hold this tokenizer. Raises UserError for what they cannot hold."""
    source = json.loads(tokenizer.files()["tokenizer.json"])
    model = source["model"]
    if model.get("type") != "BPE":
        raise _refusal([f"a {model.get('type')} vocabulary"])
    is_pieces = bool(model.get("byte_fallback"))
    added = {token["id"]: token for token in source.get("added_tokens", [])}
    words = {i: word for word, i in model["vocab"].items()}
    words |= {i: token["content"] for i, token in added.items()}
    fields: dict[str, Any] = {
        "general.name": name,
        _PREFIX + "model": "llama" if is_pieces else "gpt2",
        _PREFIX + "tokens": [words.get(i, f"[PAD{i}]") for i in range(size)],
        _PREFIX + "token_type": [_type_of(i, words, added, model) for i in range(size)],
    }
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if is_pieces:
        fields[_PREFIX + "scores"] = _scores(fields[_PREFIX + "tokens"], merges)
        fields[_PREFIX + "add_space_prefix"] = '"Prepend"' in json.dumps(source["normalizer"])
    else:
        patterns, others = gguf_pre_tokenizers.read_steps(source.get("pre_tokenizer"))
        fields[_PREFIX + "pre"] = _pre_name(patterns, others, bool(model.get("ignore_merges")))
        fields[_PREFIX + "merges"] = [" ".join(merge) for merge in merges]
    fields |= _role_fields(tokenizer, fields[_PREFIX + "tokens"])
    rebuilt = json.loads(_normal_json(tokenizer_json(fields)))
    lost, notes = find_differences(source, rebuilt)
    if lost:
        raise _refusal(lost)
    pre = fields.get(_PREFIX + "pre", "")
    if not is_pieces and PRE_TOKENIZERS[pre].unlike:
        notes.append(
            f"llama.cpp's own pattern for {pre!r} {PRE_TOKENIZERS[pre].unlike}, so it may cut some "
            "words elsewhere"
        )
    for note in notes:
        cli.say(f"note: {note}")
    return fields


def _refusal(lost: Sequence[str]) -> UserError:
    return UserError(
        f"a GGUF file cannot hold this tokenizer: it has {'; '.join(lost)}: use --format=hf"
    )


def _type_of(
    i: int, words: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]
) -> int:
    if i not in words:
        return UNUSED
    if i in added:
        if words[i] == model.get("unk_token") and added[i]["special"]:
            return UNKNOWN
        return CONTROL if added[i]["special"] else USER_DEFINED
    is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", words[i])
    return BYTE if is_byte else NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """The earlier a piece is made, the better its score."""
    ranks: dict[str, int] = {}
    for first, second in merges:
        ranks.setdefault(first + second, len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _pre_name(patterns: Sequence[str], others: Sequence[str], ignore_merges: bool) -> str:
    """The name of these cuts. Raises UserError where llama.cpp has none."""
    name = gguf_pre_tokenizers.name_of(patterns, ignore_merges=ignore_merges)
    if name and not others:
        return name
    if others:
        raise _refusal(list(others))
    if gguf_pre_tokenizers.name_of(patterns, ignore_merges=not ignore_merges):
        raise _refusal([f"ignore_merges = {str(ignore_merges).lower()} with its pre-tokenizer"])
    shown = " then ".join(patterns) or "none at all"
    shown = shown if len(shown) < 90 else shown[:87] + "..."
    raise _refusal([f"a pre-tokenizer that llama.cpp has no name for ({shown})"])


def _around(data: bytes) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json writes before and after every text."""
    import tokenizers

    library = tokenizers.Tokenizer.from_buffer(data)
    plain = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), len(full))
    return full[:start], full[start + len(plain) :]


def _role_fields(tokenizer: PretrainedTokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    """Ids of roles, what is written around a text, and the chat templates."""
    fields: dict[str, Any] = {}
    ids = {token: i for i, token in enumerate(tokens)}
    for name, gguf_name in _SPECIAL_TOKENS.items():
        if gguf_name != "eos" and tokenizer.special.get(name) in ids:
            fields[f"{_PREFIX}{gguf_name}_token_id"] = ids[tokenizer.special[name]]
    if len(tokenizer.eos_ids) > len(_ENDS):
        raise _refusal([f"{len(tokenizer.eos_ids)} tokens that end a text ({len(_ENDS)} fit)"])
    for name, i in zip(_ENDS, tokenizer.eos_ids, strict=False):
        fields[f"{_PREFIX}{name}_token_id"] = i
    before, after = _around(tokenizer.files()["tokenizer.json"])
    if len(before) > 1 or len(after) > 1 or (after and after[0] != tokenizer.eos_ids[0]):
        raise _refusal([f"the ids {before} before and {after} after every text"])
    if before:
        fields[_PREFIX + "bos_token_id"] = before[0]
    fields[_PREFIX + "add_bos_token"] = bool(before)
    fields[_PREFIX + "add_eos_token"] = bool(after)
    settings = json.loads(tokenizer.files().get("tokenizer_config.json", b"{}"))
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        for entry in templates:
            if entry["name"] != "default":
                fields[f"{_TEMPLATE}.{entry['name']}"] = entry["template"]
    if tokenizer.chat_template:
        fields[_TEMPLATE] = tokenizer.chat_template
    return fields
