"""The keys of `config.json` that mean the same in every family, and a family's table of keys.

A family says which keys it reads (`Family.defaults` has those with their values where they are
absent) and what it alone knows of; `config_table` adds what every config may hold. The lists
follow the configs of transformers 4 and 5, and what trainers leave in published files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gptjax.core.foreign_keys import KeyTable, Refusal

# Read for every family, in huggingface.py and pretrained.py. (Keys of generation_config.json are
# held against the table of that file.)
_USED = frozenset(
    {"model_type", "architectures", "vocab_size", "tie_word_embeddings", "initializer_range"}
    | {"id2label", "num_labels", "problem_type"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)

ROPE_KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
    | {"original_max_position_embeddings"}
)

DROPOUT = "dropout is off at inference; in training it is the setting model.dropout"
TENSORS_TELL = "the tensors in the file tell"
_WRITER = "who wrote the file, with what"
_SPEED = "a matter of speed or memory"
_DTYPE = "the dtype is that of the tensors in the file"
_RETURNED = "what a call of transformers returns"
_TOKENIZER = "belongs to the tokenizer"
_CODE = "no code of a checkpoint is ever run"
_OTHER_HEADS = "of heads that are not read here"
_IMPORTED = "what a library chose for itself"

NO_EFFECT: dict[str, str] = {
    "_name_or_path": _WRITER,
    "name_or_path": _WRITER,
    "_commit_hash": _WRITER,
    "transformers_version": _WRITER,
    "transformers.js_config": _WRITER,
    "mlx_lm_version": _WRITER,
    "axolotl_*": _WRITER,
    "unsloth_*": _WRITER,
    "model_name": _WRITER,
    "num_steps": _WRITER,
    "is_llama_config": _WRITER,
    "use_cache": _SPEED,
    "chunk_size_feed_forward": _SPEED,
    "pretraining_tp": _SPEED,
    "gradient_checkpointing": _SPEED,
    "use_gradient_checkpointing": _SPEED,
    "_gradient_checkpointing": _SPEED,
    "torchscript": _SPEED,
    "base_model_*_plan": _SPEED,
    "_attn_implementation*": _SPEED,
    "attn_implementation": _SPEED,
    "_experts_implementation*": _SPEED,
    "experts_implementation": _SPEED,
    "_flash_attn_2_enabled": _SPEED,
    "use_flash_attn*": _SPEED,
    "use_flash_attention*": _SPEED,
    "reorder_and_upcast_attn": _SPEED,
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "use_bfloat16": _DTYPE,
    "output_past": _RETURNED,
    "return_dict": _RETURNED,
    "tie_last_hidden_states": _RETURNED,
    "is_decoder": "the decoders read here attend to the left in any case",
    "attention_dropout": DROPOUT,
    "hidden_dropout": DROPOUT,
    "*_dropout_prob": DROPOUT,
    "classifier_dropout": DROPOUT,
    "*_pdrop": DROPOUT,
    "task_specific_params": "options of transformers' pipelines",
    "finetuning_task": _WRITER,
    "label2id": "id2label says the same",
    "_num_labels": "num_labels or id2label says it",
    "tokenizer_*": _TOKENIZER,
    "model_max_length": _TOKENIZER,
    "max_sequence_length": _TOKENIZER,
    "prefix": _TOKENIZER,
    "sep_token_id": _TOKENIZER,
    "cls_token_id": _TOKENIZER,
    "mask_token_id": _TOKENIZER,
    "unk_token_id": _TOKENIZER,
    "auto_map": _CODE,
    "custom_pipelines": _CODE,
    "trust_remote_code": _CODE,
    "summary_*": _OTHER_HEADS,
    "ignore_keys_at_rope_validation": _IMPORTED,
    "tf_legacy_loss": _IMPORTED,
}

_ENCODER = "only decoders are read here"
_PER_LAYER = "all layers of a model are alike here"

REFUSED: dict[str, Refusal] = {
    "is_encoder_decoder": Refusal(_ENCODER),
    "add_cross_attention": Refusal(_ENCODER),
    "cross_attention_hidden_size": Refusal(_ENCODER),
    "tie_encoder_decoder": Refusal(_ENCODER),
    "is_causal": Refusal("each token attends to those before it only", unless=(True,)),
    "use_bidirectional_attention": Refusal("each token attends to those before it only"),
    "pruned_heads": Refusal(_PER_LAYER, unless=({},)),
    "per_layer_config": Refusal(_PER_LAYER, unless=({},)),
    "rope_interleaved": Refusal("RoPE turns the two halves of a head"),
    "use_mrope": Refusal("positions are those of text"),
    "lm_head_bias": Refusal("heads have no bias here"),
    "quantization_config": Refusal("use the unquantised checkpoint, or a GGUF of it"),
    "compression_config": Refusal("use the unquantised checkpoint, or a GGUF of it"),
    "quantization": Refusal("use the unquantised checkpoint, or a GGUF of it"),
}


def config_table(
    model_type: str,
    used: Iterable[str],
    *,
    no_effect: Mapping[str, str] | None = None,
    refused: Mapping[str, Refusal] | None = None,
) -> KeyTable:
    """The table of a family's config.json: its own keys, and those of every config."""
    own = {**(no_effect or {}), **(refused or {})}.keys() | set(used)
    return KeyTable(
        f"config.json of {model_type}",
        used=(_USED | set(used)) - (no_effect or {}).keys() - (refused or {}).keys(),
        no_effect={k: v for k, v in NO_EFFECT.items() if k not in own} | dict(no_effect or {}),
        refused={k: v for k, v in REFUSED.items() if k not in own} | dict(refused or {}),
    )
