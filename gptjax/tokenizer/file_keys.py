"""What becomes of each key of a tokenizer's files; the page "Foreign files" shows the tables.

To honour another key, read it in the file that the table's name says and move it to `used`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.config.errors import UserError, unknown_name
from gptjax.core.foreign_keys import KeyTable, Refusal

_TRAINING = "a setting of training the vocabulary"
_BATCHES = "how batches are made of rows; batches are made here"
_OFFSETS = "where tokens stand in a text, which nothing here asks for"

# Of each kind of part in a tokenizer.json: its keys. The library `tokenizers` runs them.
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        "BPE": (
            *("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"),
            *("byte_fallback", "ignore_merges", "vocab", "merges"),
        ),
        "WordPiece": (
            *("unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"),
        ),
        "WordLevel": ("unk_token", "vocab"),
        "Unigram": ("unk_id", "byte_fallback", "vocab"),
    },
    "normalizer": {
        "BertNormalizer": ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"),
        "Strip": ("strip_left", "strip_right"),
        "StripAccents": (),
        **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "ByteLevel"), ()),
        "Prepend": ("prepend",),
        "Replace": ("pattern", "content"),
        "Precompiled": ("precompiled_charsmap",),
        "Sequence": ("normalizers",),
    },
    "pre_tokenizer": {
        **dict.fromkeys(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"), ()),
        "ByteLevel": ("add_prefix_space", "use_regex"),
        "CharDelimiterSplit": ("delimiter",),
        "Digits": ("individual_digits",),
        "FixedLength": ("length",),
        "Metaspace": ("replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"),
        "Punctuation": ("behavior",),
        "Sequence": ("pretokenizers",),
        "Split": ("pattern", "behavior", "invert"),
        "UnicodeScripts": (),
    },
    "post_processor": {
        "BertProcessing": ("sep", "cls"),
        "ByteLevel": (),
        "RobertaProcessing": ("sep", "cls"),
        "Sequence": ("processors",),
        "TemplateProcessing": ("single", "special_tokens"),
    },
    "decoder": {
        "BPEDecoder": ("suffix",),
        "ByteFallback": (),
        "ByteLevel": (),
        "CTC": ("pad_token", "word_delimiter_token", "cleanup"),
        "Fuse": (),
        "Metaspace": ("replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"),
        "Replace": ("pattern", "content"),
        "Sequence": ("decoders",),
        "Strip": ("content", "start"),
        "WordPiece": ("prefix", "cleanup"),
    },
}


def _keys_of_parts() -> Iterator[str]:
    for part, kinds in _PARTS.items():
        for kind, keys in kinds.items():
            yield from (f"{part}.{kind}.{key}" for key in ("type", *keys))


def _keys_of_added() -> Iterator[str]:
    for key in ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"):
        yield f"added_tokens.{key}"


TOKENIZER_JSON = KeyTable(
    "tokenizer.json",
    used=frozenset({"version", "added_tokens", *_PARTS, *_keys_of_parts(), *_keys_of_added()}),
    no_effect={
        "truncation": "texts are cut by named settings here, never by a tokenizer",
        "padding": "rows are filled up where batches are made",
        "*.ByteLevel.trim_offsets": _OFFSETS,
        "*.RobertaProcessing.trim_offsets": _OFFSETS,
        "*.RobertaProcessing.add_prefix_space": _OFFSETS,
        "post_processor.ByteLevel.add_prefix_space": _OFFSETS,
        "post_processor.ByteLevel.use_regex": _OFFSETS,
        "decoder.ByteLevel.add_prefix_space": "the library decodes the same with and without",
        "decoder.ByteLevel.use_regex": "the library decodes the same with and without",
        "post_processor.TemplateProcessing.pair": "pairs of texts are joined by templates of tasks",
    },
    refused={
        "model.BPE.dropout": Refusal(
            "text would be cut at random, another way each time; set it to null",
            unless=(0, 0.0),
        ),
        "decoder.Strip.stop": Refusal(
            "a text that is written as it grows cannot take its end back", unless=(0,)
        ),
    },
)


def check_tokenizer_json(described: Mapping[str, Any]) -> None:
    """Refuses a tokenizer.json with a part or a key that is not honoured. Raises UserError."""
    where = "tokenizer.json"
    if not isinstance(described.get("model"), Mapping) or "vocab" not in described["model"]:
        raise UserError(f"{where} is damaged or another file: it has no model with a vocabulary")
    TOKENIZER_JSON.check(described, where)
    for token in described.get("added_tokens") or []:
        TOKENIZER_JSON.check({f"added_tokens.{key}": token[key] for key in token}, where)
    for name in _PARTS:
        for kind, part in _kinds_in(name, described.get(name)):
            if kind not in _PARTS[name]:
                problem = unknown_name(name.replace("_", "-"), kind, list(_PARTS[name]))
                raise UserError(f"{where}: {problem}")
            TOKENIZER_JSON.check({f"{name}.{kind}.{key}": part[key] for key in part}, where)


def _kinds_in(name: str, part: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(type, part) of a part and of those in it; files before 2020 name no type of a model."""
    if not isinstance(part, Mapping):
        return
    kind = part.get("type")
    if kind is None and name == "model":
        keys = {"merges": "BPE", "unk_id": "Unigram"}
        kind = next((keys[key] for key in keys if key in part), "WordPiece")
    yield str(kind), part
    if kind == "Sequence":
        for value in part.values():
            for inner in value if isinstance(value, list) else ():
                yield from _kinds_in(name, inner)


_USED = frozenset(
    {
        *("*_token", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
        *("chat_template", "tokenizer_class", "clean_up_tokenization_spaces"),
    }
)
_NO_EFFECT = {
    "model_max_length": "the model's context is in config.json",
    **dict.fromkeys(("max_len", "max_length", "max_seq_length", "max_seq_len"), _BATCHES),
    **dict.fromkeys(
        ("padding", "padding_side", "padding_strategy", "pad_to_multiple_of"), _BATCHES
    ),
    **dict.fromkeys(("truncation", "truncation_side", "truncation_strategy", "stride"), _BATCHES),
    **dict.fromkeys(("pad_token_type_id", "return_token_type_ids", "return_tensors"), _BATCHES),
    "*_token_id": "config.json and the names of the tokens say them",
    "*_token_ids": "config.json and the names of the tokens say them",
    **dict.fromkeys(("model_input_names", "input_names", "model_type"), "names in another program"),
    **dict.fromkeys(("processor_class", "image_processor", "feature_extractor"), "not about text"),
    **dict.fromkeys(
        ("image_*", "video_*", "audio_*", "vision_*", "boi_*", "eoi_*"), "not about text"
    ),
    **dict.fromkeys(
        (
            *("name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file"),
            *("vocab_file", "merges_file", "init_inputs", "is_local", "local_files_only"),
            *("files_loaded", "_commit_hash", "transformers_version", "backend", "use_fast"),
            *("device_map", "trust_remote_code", "verbose", "from_slow", "vocab_size"),
            *("tokenizer_type", "slow_tokenizer_class", "tokenizer_version"),
        ),
        "where and how another program read its files",
    ),
    **dict.fromkeys(
        ("errors", "trim_offsets", "response_schema", "response_template", "chat_control_tokens"),
        "not about ids or the text of valid ids",
    ),
    "spaces_between_special_tokens": "control tokens are left out of texts",
    "split_special_tokens": "names of control tokens in a text stay text here in any case",
    "use_default_system_prompt": "the chat template says all of the prompt",
    **dict.fromkeys(("language", "suffix_first", "spm_file"), "not about ids"),
    "sp_model_kwargs": "empty, or options of sampling",
}
_REFUSED = {
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": Refusal(
        "it takes spaces out of what a model writes; remove it"
    ),
}

# tokenizer.json says all about ids and text, so nothing else in the settings can change them.
SETTINGS = KeyTable(
    "tokenizer_config.json next to tokenizer.json",
    used=_USED,
    no_effect={
        **_NO_EFFECT,
        **dict.fromkeys(
            ("add_bos_token", "add_eos_token"), "tokenizer.json's post-processor says it"
        ),
        **dict.fromkeys(
            (
                *("add_prefix_space", "legacy", "legacy_behaviour", "do_lower_case", "lowercase"),
                *("strip_accents", "tokenize_chinese_chars", "do_basic_tokenize", "never_split"),
                *("auto_map", "fix_mistral_regex", "remove_space", "keep_accents", "unk_id"),
                *("wordpieces_prefix", "clean_text", "do_split_on_punc", "extra_ids", "offset"),
                *("byte_fallback", "normalization"),
            ),
            "tokenizer.json says how text is cut",
        ),
        "*": "tokenizer.json alone says how text becomes ids and ids become text",
    },
    refused=_REFUSED,
)

_OLDER_REFUSED = {
    **_REFUSED,
    "auto_map": Refusal(
        "the checkpoint brings its own program for cutting text, which is never run here: save the "
        "tokenizer with transformers, so that the folder has a tokenizer.json"
    ),
}

BYTE_LEVEL_SETTINGS = KeyTable(
    "tokenizer_config.json next to vocab.json and merges.txt",
    used=_USED | {"add_bos_token", "add_prefix_space"},
    no_effect={
        **_NO_EFFECT,
        "add_eos_token": "a prompt does not end with the end token",
        "fix_mistral_regex": "for tokenizer.json files of Mistral",
    },
    refused=_OLDER_REFUSED,
)

WORD_PIECE_SETTINGS = KeyTable(
    "tokenizer_config.json next to vocab.txt",
    used=_USED | {"do_lower_case", "strip_accents", "tokenize_chinese_chars"},
    no_effect={**_NO_EFFECT, "add_eos_token": "a prompt does not end with the end token"},
    refused={
        **_OLDER_REFUSED,
        "do_basic_tokenize": Refusal("text is cut at punctuation first", unless=(True,)),
        "never_split": Refusal("words that are never cut are not known here", unless=([],)),
    },
)

SENTENCEPIECE_SETTINGS = KeyTable(
    "tokenizer_config.json next to tokenizer.model",
    used=_USED | {"add_bos_token", "add_prefix_space", "legacy"},
    no_effect={
        **{key: why for key, why in _NO_EFFECT.items() if key != "sp_model_kwargs"},
        "add_eos_token": "a prompt does not end with the end token",
    },
    refused={
        **_OLDER_REFUSED,
        "sp_model_kwargs": Refusal(
            "sampling would cut text another way each time", unless=({}, {"enable_sampling": False})
        ),
    },
)


def check_settings(content: Mapping[str, bytes], settings: Mapping[str, Any]) -> None:
    """Refuses settings that the files in `content` leave without effect though they ask for one."""
    if "tokenizer.json" in content:
        table = SETTINGS
    elif "merges.txt" in content:
        table = BYTE_LEVEL_SETTINGS
    elif "tokenizer.model" in content:
        table = SENTENCEPIECE_SETTINGS
    else:
        table = WORD_PIECE_SETTINGS
    table.check(settings, "tokenizer_config.json")


SPECIAL_TOKENS_MAP = KeyTable(
    "special_tokens_map.json",
    used=frozenset({"*_token", "additional_special_tokens", "extra_special_tokens"}),
)

_FIELDS = {
    "trainer_spec": {
        1: "input",
        2: "model_prefix",
        3: "model_type",
        4: "vocab_size",
        5: "accept_language",
        6: "self_test_sample_size",
        7: "input_format",
        10: "character_coverage",
        11: "input_sentence_size",
        12: "mining_sentence_size",
        13: "training_sentence_size",
        14: "seed_sentencepiece_size",
        15: "shrinking_factor",
        16: "num_threads",
        17: "num_sub_iterations",
        18: "max_sentence_length",
        19: "shuffle_input_sentence",
        20: "max_sentencepiece_length",
        21: "split_by_unicode_script",
        22: "split_by_whitespace",
        23: "split_by_number",
        24: "treat_whitespace_as_suffix",
        25: "split_digits",
        26: "allow_whitespace_only_pieces",
        30: "control_symbols",
        31: "user_defined_symbols",
        32: "vocabulary_output_piece_score",
        33: "hard_vocab_limit",
        34: "use_all_vocab",
        35: "byte_fallback",
        36: "required_chars",
        40: "unk_id",
        41: "bos_id",
        42: "eos_id",
        43: "pad_id",
        44: "unk_surface",
        45: "unk_piece",
        46: "bos_piece",
        47: "eos_piece",
        48: "pad_piece",
        49: "train_extremely_large_corpus",
        50: "enable_differential_privacy",
        51: "differential_privacy_noise_level",
        52: "differential_privacy_clipping_threshold",
        53: "pretokenization_delimiter",
        54: "seed_sentencepieces_file",
        55: "auto_character_coverage",
    },
    "normalizer_spec": {
        1: "name",
        2: "precompiled_charsmap",
        3: "add_dummy_prefix",
        4: "remove_extra_whitespaces",
        5: "escape_whitespaces",
        6: "normalization_rule_tsv",
    },
}
_FIELDS["denormalizer_spec"] = _FIELDS["normalizer_spec"]
_RUN = ("model_type", "byte_fallback", "unk_id", "bos_id", "eos_id", "pad_id")
_RUN_PIECES = ("unk_piece", "bos_piece", "eos_piece", "pad_piece", "user_defined_symbols")

# Fields by name, as "normalizer_spec.name"; a number where the format has grown.
SENTENCEPIECE = KeyTable(
    "tokenizer.model",
    used=frozenset(
        {
            *("pieces", "trainer_spec", "normalizer_spec", "denormalizer_spec"),
            *(f"trainer_spec.{name}" for name in (*_RUN, *_RUN_PIECES, "control_symbols")),
            *("normalizer_spec.precompiled_charsmap", "normalizer_spec.add_dummy_prefix"),
            *("normalizer_spec.remove_extra_whitespaces", "normalizer_spec.escape_whitespaces"),
        }
    ),
    no_effect={
        "self_test_data": "texts with which the trainer tested the file",
        "trainer_spec.unk_surface": "unknown pieces are left out of texts",
        "normalizer_spec.name": "the rules are in precompiled_charsmap",
        "normalizer_spec.normalization_rule_tsv": "the rules are in precompiled_charsmap",
        "denormalizer_spec.name": "the rules are in precompiled_charsmap",
        **{
            f"trainer_spec.{name}": _TRAINING
            for name in _FIELDS["trainer_spec"].values()
            if name not in (*_RUN, *_RUN_PIECES, "control_symbols", "unk_surface")
            and name != "treat_whitespace_as_suffix"
        },
    },
    refused={
        "trainer_spec.treat_whitespace_as_suffix": Refusal(
            "a space is written before words here", unless=(0,)
        ),
        "denormalizer_spec.precompiled_charsmap": Refusal(
            "rules that change decoded text are not known here", unless=("",)
        ),
    },
)


def read_sentencepiece_fields(model: bytes) -> dict[str, Any]:
    """{"trainer_spec.model_type": 2, ...}: the fields of a sentencepiece model but its pieces.

    Texts are "" where they are empty and the length where not. Raises UserError where the file is
    no such model.
    """
    names = {
        1: "pieces",
        2: "trainer_spec",
        3: "normalizer_spec",
        4: "self_test_data",
        5: "denormalizer_spec",
    }
    fields: dict[str, Any] = {}
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
        raise UserError(
            "tokenizer.model is a vocabulary of tiktoken, as Llama 3 has in its authors' own "
            "format: use the tokenizer.json of its conversion"
        )
    try:
        for number, value in _read_message(model):
            name = names.get(number, f"field {number}")
            fields[name] = True
            if name in _FIELDS and isinstance(value, bytes):
                for inner, inner_value in _read_message(value):
                    key = f"{name}.{_FIELDS[name].get(inner, f'field {inner}')}"
                    if isinstance(inner_value, bytes):
                        fields[key] = len(inner_value) or ""
                    else:
                        fields[key] = inner_value
    except (IndexError, ValueError):
        raise UserError("tokenizer.model is damaged, or no model of sentencepiece") from None
    return fields


def read_pieces(model: bytes) -> list[tuple[str, float, int]]:
    """(text, score, type) of each piece of a sentencepiece model; GGUF numbers types alike."""
    pieces: list[tuple[str, float, int]] = []
    for number, value in _read_message(model):
        if number == 1 and isinstance(value, bytes):
            fields: dict[int, Any] = dict(_read_message(value))
            (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
            pieces.append((fields[1].decode(), score, fields.get(3, 1)))
    return pieces


def _read_message(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size = varint()
        if at + size > len(data):
            raise ValueError("the message ends early")
        yield number, data[at : at + size]
        at += size


TOKENIZER_TABLES = (
    TOKENIZER_JSON,
    SETTINGS,
    BYTE_LEVEL_SETTINGS,
    WORD_PIECE_SETTINGS,
    SENTENCEPIECE_SETTINGS,
    SPECIAL_TOKENS_MAP,
    SENTENCEPIECE,
)
