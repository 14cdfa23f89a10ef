"""A tokenizer as the fields of a GGUF file.

`vocabulary_fields` takes the fields that fit best, makes a tokenizer.json of them as a reader
would, and refuses by name whatever then differs from the tokenizer that it was given
(gguf_differences.py). A `tokenizer.model` is written from its own pieces and scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.checkpoints import gguf_pre_tokenizers
from gptjax.checkpoints.gguf_differences import different_model_file, find_differences
from gptjax.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS
from gptjax.checkpoints.gguf_vocabulary import (
    BYTE,
    CONTROL,
    ENDS,
    NORMAL,
    PREFIX,
    SPECIAL_TOKENS,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    normal_json,
    strips_by_name,
    tokenizer_json,
)
from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.core.characters import shorten
from gptjax.tokenizer.added_tokens import read_added, read_settings
from gptjax.tokenizer.file_keys import read_pieces
from gptjax.tokenizer.pieces import SPACE
from gptjax.tokenizer.pretrained import PretrainedTokenizer
from gptjax.tokenizer.template_files import read_templates


def write_vocabulary(writer: Any, tokenizer: PretrainedTokenizer, size: int, name: str) -> None:
    """Adds the tokenizer's fields, and the model's name, to a `gguf.GGUFWriter`.

    size: tokens of the model; ids past the tokenizer's are written as unused. Raises UserError for
    what the format cannot hold.
    """
    fields = vocabulary_fields(tokenizer, size, name)
    adders = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            adders[type(value)](key, value)


def vocabulary_fields(tokenizer: PretrainedTokenizer, size: int, name: str) -> dict[str, Any]:
    """The fields of a file that hold this tokenizer. Raises UserError for what they cannot hold."""
    files = tokenizer.files()
    if "tokenizer.json" not in files:
        fields = _model_file_fields(files, size, add_space_prefix=tokenizer.leading_space)
        fields |= _role_fields(tokenizer, fields[PREFIX + "tokens"])
        return {"general.name": name, **fields}
    source = tokenizer.described()
    past = [token for token in source["added_tokens"] if token["id"] >= size]
    source["added_tokens"] = [token for token in source["added_tokens"] if token["id"] < size]
    notes = []
    if past:
        notes.append(f"{past[0]['content']!r} is left out: the model's table ends before it")
    fields = {"general.name": _name_that_fits(source, name), **_json_fields(source, size)}
    fields |= _role_fields(tokenizer, fields[PREFIX + "tokens"])
    rebuilt = json.loads(normal_json(tokenizer_json(fields)))
    lost, others = find_differences(source, rebuilt)
    if lost:
        raise _refusal(lost)
    pre = fields.get(PREFIX + "pre", "")
    if pre and PRE_TOKENIZERS[pre].unlike:
        notes.append(
            f"llama.cpp's own pattern for {pre!r} {PRE_TOKENIZERS[pre].unlike}, so it may cut some "
            "words elsewhere"
        )
    for note in [*notes, *others]:
        cli.say(f"note: {note}")
    return fields


def _name_that_fits(source: Mapping[str, Any], name: str) -> str:
    """The model's name, by which llama.cpp tells whether tokens swallow the white space after."""
    strips = any(token["special"] and token.get("rstrip") for token in source["added_tokens"])
    if strips and not strips_by_name(name):
        return f"phi-3 {name}"
    return name if strips else re.sub("(?i)phi-?3", "phi 3", name)


def _refusal(lost: Sequence[str]) -> UserError:
    return UserError(
        f"a GGUF file cannot hold this tokenizer: it has {'; '.join(lost)}: use --format=hf"
    )


def _json_fields(source: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The vocabulary of a tokenizer.json."""
    model = source["model"]
    if model.get("type") != "BPE":
        raise _refusal([f"a {model.get('type')} vocabulary"])
    added = {token["id"]: token for token in source["added_tokens"]}
    words = {i: word for word, i in model["vocab"].items()}
    words |= {i: token["content"] for i, token in added.items()}
    tokens = [words.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_type_of(i, words, added, model) for i in range(size)]
    fields: dict[str, Any] = {PREFIX + "tokens": tokens, PREFIX + "token_type": types}
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        fields[PREFIX + "model"] = "llama"
        fields[PREFIX + "scores"] = _scores(tokens, merges)
        fields[PREFIX + "add_space_prefix"] = '"Prepend"' in json.dumps(source["normalizer"])
        return fields
    patterns, others = gguf_pre_tokenizers.read_steps(source.get("pre_tokenizer"))
    fields[PREFIX + "model"] = "gpt2"
    fields[PREFIX + "pre"] = _pre_name(patterns, others, bool(model.get("ignore_merges")))
    fields[PREFIX + "merges"] = [" ".join(merge) for merge in merges]
    return fields


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
    if others:
        raise _refusal(others)
    if name := gguf_pre_tokenizers.name_of(patterns, ignore_merges=ignore_merges):
        return name
    if gguf_pre_tokenizers.name_of(patterns, ignore_merges=not ignore_merges):
        raise _refusal([f"ignore_merges = {str(ignore_merges).lower()} with its pre-tokenizer"])
    pattern = shorten(" then ".join(patterns) or "none at all", 90)
    raise _refusal([f"a pre-tokenizer that llama.cpp has no name for ({pattern})"])


def _model_file_fields(
    files: Mapping[str, bytes], size: int, *, add_space_prefix: bool
) -> dict[str, Any]:
    """The pieces of a tokenizer.model, and the tokens that other files add."""
    model, settings = files["tokenizer.model"], read_settings(files)
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    for text, score, kind in read_pieces(model):
        # what is matched as it stands in a text has no sign for a space there
        tokens.append(text.replace(SPACE, " ") if kind == USER_DEFINED else text)
        scores.append(score)
        types.append(kind)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    types += [UNUSED] * (size - len(types))
    scores += [min(scores, default=0.0)] * (size - len(scores))
    ids = {token: i for i, token in enumerate(tokens)}
    added = read_added(files, settings)
    for token in added:
        i = ids.get(token.content, token.id)
        if i is not None and i < size:
            tokens[i] = token.content
            if types[i] not in (UNKNOWN, CONTROL):
                types[i] = CONTROL if token.special else USER_DEFINED
    if lost := different_model_file(model, types, settings, added, prefix=add_space_prefix):
        raise _refusal(lost)
    fields: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "add_space_prefix": add_space_prefix,
    }
    return {PREFIX + key: value for key, value in fields.items()}


def _role_fields(tokenizer: PretrainedTokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    """Ids of roles, what is written around a text, and the chat templates."""
    before, after = tokenizer.bos_ids, tokenizer.end_ids
    fields: dict[str, Any] = {}
    ids = {token: i for i, token in enumerate(tokens)}
    for name, gguf_name in SPECIAL_TOKENS.items():
        if gguf_name != "eos" and tokenizer.special.get(name) in ids:
            fields[f"{PREFIX}{gguf_name}_token_id"] = ids[tokenizer.special[name]]
    if len(tokenizer.eos_ids) > len(ENDS):
        raise _refusal([f"{len(tokenizer.eos_ids)} tokens that end a text ({len(ENDS)} fit)"])
    for name, i in zip(ENDS, tokenizer.eos_ids, strict=False):
        fields[f"{PREFIX}{name}_token_id"] = i
    if len(before) > 1 or len(after) > 1 or (after and after[0] != tokenizer.eos_ids[0]):
        raise _refusal([f"the ids {list(before)} before and {list(after)} after every text"])
    if before:
        fields[PREFIX + "bos_token_id"] = before[0]
    fields[PREFIX + "add_bos_token"] = bool(before)
    fields[PREFIX + "add_eos_token"] = bool(after)
    files = tokenizer.files()
    for name, template in read_templates(files, read_settings(files)).items():
        if name != "default":
            fields[f"{TEMPLATE}.{name}"] = template
    if tokenizer.chat_template:
        fields[TEMPLATE] = tokenizer.chat_template
    return fields
