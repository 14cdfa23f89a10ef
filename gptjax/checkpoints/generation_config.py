"""`generation_config.json`: what a checkpoint suggests for generating text.

Its end tokens are used. Its sampling is not taken over, since every request here says its own
(greedy without any): `suggestions` gives what would change a text, so that `gptjax.load` can say so
once, with the options that do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.core import files
from gptjax.core.foreign_keys import KeyTable, Refusal

# {key that changes texts: (our option for it, values that change nothing)}
_OPTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "temperature": ("temperature", (1.0,)),
    "top_k": ("top_k", (50, 0)),  # 50 is the format's own default
    "top_p": ("top_p", (1.0,)),
    "min_p": ("min_p", (0.0,)),
    "typical_p": ("typical_p", (1.0,)),
    "repetition_penalty": ("repetition_penalty", (1.0,)),
    "no_repeat_ngram_size": ("no_repeat_ngram", (0,)),
    "min_new_tokens": ("min_new_tokens", (0,)),
    "num_beams": ("num_beams", (1,)),
    "bad_words_ids": ("banned", ([],)),
    "suppress_tokens": ("banned", ([],)),
    "stop_strings": ("stop", ([],)),
}

# What counts only where texts are drawn.
_ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")

_ENCODER = "of models with an encoder"
_LENGTH = "a limit of length: --max_new_tokens here"
_SPEED = "a matter of speed or memory"
_RETURNED = "what a call of transformers returns"
_CHAT = "of the author's own chat code"

_NOT_SUPPORTED = "no option here does it; remove it from generation_config.json to go without"

GENERATION_CONFIG = KeyTable(
    "generation_config.json",
    used=frozenset(
        {*_OPTIONS, "do_sample", "length_penalty", "early_stopping"}
        | {"eos_token_id", "bos_token_id", "pad_token_id"}
    ),
    no_effect={
        "max_length": _LENGTH,
        "max_new_tokens": _LENGTH,
        "max_time": _LENGTH,
        "num_return_sequences": "--n here",
        "use_cache": _SPEED,
        "cache_implementation": _SPEED,
        "cache_config": _SPEED,
        "max_cache_len": _SPEED,
        "low_memory": _SPEED,
        "prefill_chunk_size": _SPEED,
        "compile_config": _SPEED,
        "disable_compile": _SPEED,
        "continuous_batching_config": _SPEED,
        "return_legacy_cache": _SPEED,
        "is_assistant": _SPEED,
        "num_assistant_tokens": _SPEED,
        "num_assistant_tokens_schedule": _SPEED,
        "assistant_*": _SPEED,
        "target_lookbehind": _SPEED,
        "prompt_lookup_num_tokens": _SPEED,
        "max_matching_ngram_size": _SPEED,
        "speculation_type": _SPEED,
        "use_mtp": _SPEED,
        "output_*": _RETURNED,
        "return_dict_in_generate": _RETURNED,
        "remove_invalid_values": "NaN is an error here",
        "renormalize_logits": "scores of beams are always normalised",
        "decoder_start_token_id": _ENCODER,
        "encoder_*": _ENCODER,
        "transformers_version": "who wrote the file",
        "_from_model_config": "who wrote the file",
        "_commit_hash": "who wrote the file",
        "trust_remote_code": "no code of a checkpoint is ever run",
        "chat_format": _CHAT,
        "max_window_size": _CHAT,
        "max_context_size": _CHAT,
        "stop_words_ids": _CHAT,
        "user_token_id": _CHAT,
        "assistant_token_id": _CHAT,
        "unk_token_id": "belongs to the tokenizer",
        "diversity_penalty": "counts only with num_beam_groups",
        "top_h": "counts only where texts are drawn",
        "epsilon_cutoff": "counts only where texts are drawn",
        "eta_cutoff": "counts only where texts are drawn",
    },
    refused={
        "min_length": Refusal("it counts the prompt too; use --min_new_tokens", unless=(0,)),
        "num_beam_groups": Refusal(_NOT_SUPPORTED, unless=(1,)),
        "penalty_alpha": Refusal(_NOT_SUPPORTED, unless=(0, 0.0)),
        "dola_layers": Refusal(_NOT_SUPPORTED),
        "forced_bos_token_id": Refusal(_NOT_SUPPORTED),
        "forced_eos_token_id": Refusal(_NOT_SUPPORTED),
        "begin_suppress_tokens": Refusal(_NOT_SUPPORTED, unless=([],)),
        "exponential_decay_length_penalty": Refusal(_NOT_SUPPORTED),
        "sequence_bias": Refusal(_NOT_SUPPORTED, unless=([], {})),
        "force_words_ids": Refusal(_NOT_SUPPORTED, unless=([],)),
        "constraints": Refusal(_NOT_SUPPORTED, unless=([],)),
        "token_healing": Refusal(_NOT_SUPPORTED),
        "guidance_scale": Refusal(_NOT_SUPPORTED, unless=(1, 1.0)),
        "watermarking_config": Refusal(_NOT_SUPPORTED, unless=({},)),
    },
)

# What config.json has for itself.
_OF_THE_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def is_generation_key(key: str) -> bool:
    """Whether a key of config.json is one of this file: transformers 4 wrote them there too."""
    return GENERATION_CONFIG.knows(key) and key not in _OF_THE_MODEL


def read_generation_config(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder's generation_config.json says or, without one, its config.json, `raw`.

    Raises UserError for what changes texts in a way that no option can.
    """
    path = folder / "generation_config.json"
    if path.exists():
        values, name = files.read_json(path), path.name
    else:
        values = {key: value for key, value in raw.items() if is_generation_key(key)}
        name = "config.json"
    GENERATION_CONFIG.check(values, name)
    return values


def suggestions(values: Mapping[str, Any]) -> list[str]:
    """What of these values would change texts, as our options: ["top_p = 0.9", ...]."""
    result = []
    if values.get("do_sample") and values.get("temperature") in (None, 1.0):
        result.append("temperature = 1.0")
    for key, (option, neutral) in _OPTIONS.items():
        value = values.get(key)
        drawn_only = key in _ONLY_SAMPLING and not values.get("do_sample")
        if value is None or value in neutral or drawn_only:
            continue
        result.append(f"{option} = {[[i] for i in value] if key == 'suppress_tokens' else value}")
    return result
