"""Hugging Face checkpoints: one table of names and transforms for each family, read in both directions.

A family says how its `config.json` reads as a `ModelConfig` and is written from one, and which of their tensors make which of our
parameters (`gptjax.transfer` applies them). To add a family, add a function of rows and an entry in `FAMILIES`. Both spellings of configs are read (transformers 4 and 5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gptjax.checkpoints.families.common import Family
from gptjax.checkpoints.families.gpt2 import gpt2_maps, read_gpt2, write_gpt2
from gptjax.checkpoints.families.gpt_neox import neox_maps, read_neox, write_neox
from gptjax.checkpoints.families.llama import llama_maps, read_llama, write_llama
from gptjax.checkpoints.tensor_map import Raw
from gptjax.config import build
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", read_gpt2, write_gpt2, gpt2_maps),
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", read_neox, write_neox, neox_maps),
    "llama": Family("LlamaForCausalLM", "model.", read_llama, write_llama, llama_maps),
    "mistral": Family("MistralForCausalLM", "model.", read_llama, write_llama, llama_maps),
    "qwen2": Family("Qwen2ForCausalLM", "model.", read_llama, write_llama, llama_maps),
    "qwen3": Family("Qwen3ForCausalLM", "model.", read_llama, write_llama, llama_maps),
}


# Buffers that old files carry: masks of GPT-2 and NeoX, RoPE's frequencies.
BUFFERS = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


def family_of(c: ModelConfig) -> str:
    """The family that holds a model of this config. Raises UserError where none does."""
    plain = not c.logit_softcap and c.rotary_fraction == 1.0 and not c.parallel
    square = (
        c.kv == c.heads
        and c.head_width * c.heads == c.width
        and not c.sliding_window
        and not c.qk_norm
        and not c.logit_softcap
    )
    if c.norm == "layernorm" and c.mlp != "swiglu" and c.bias == "all" and square:
        if c.positions == "learned" and not c.parallel:
            return "gpt2"
        if c.positions == "rope":
            return "gpt_neox"
    if c.positions == "rope" and c.norm == "rmsnorm" and c.mlp == "swiglu" and plain:
        if c.qk_norm and c.bias in ("none", "attention"):
            return "qwen3"
        if c.bias == "qkv" and not c.qk_norm and c.head_width * c.heads == c.width:
            return "qwen2"
        if c.bias in ("none", "attention") and not c.qk_norm:
            if not c.sliding_window:
                return "llama"
            if c.bias == "none":
                return "mistral"
    raise UserError(
        f"no Hugging Face architecture holds this model (positions {c.positions}, norm {c.norm}, mlp {c.mlp}, bias {c.bias}, window {c.sliding_window}, "
        f"softcap {c.logit_softcap});\nknown: {', '.join(FAMILIES)}. Keep it as a workdir: --format=gptjax"
    )


def read_config(raw: Raw) -> ModelConfig:
    """`config.json` as a ModelConfig. Raises UserError for an unknown architecture, a missing key or a value that makes no sense."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"config.json: {unknown_name('architecture', str(kind), list(FAMILIES))}")
    try:
        return build.build_config(
            {"model": {**FAMILIES[kind].read(raw), "labels": _labels(raw)}}
        ).model
    except KeyError as error:
        raise UserError(f"config.json has no {error}, which a {kind} model needs") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise UserError(f"config.json: {error}") from None
        raise UserError(f"config.json holds a value of a wrong type: {error}") from None


def _labels(raw: Raw) -> list[str]:
    """Names of the classes of a `...ForSequenceClassification`; none of a language model."""
    if not any(
        str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or []
    ):
        return []
    names = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}
    return [str(names[key]) for key in sorted(names, key=int)]


def write_config(c: ModelConfig, dtype: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a model. extra: ids of special tokens and other keys to keep."""
    kind = family_of(c)
    family = FAMILIES[kind]
    architecture = family.architecture
    if c.labels:
        architecture = re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", architecture)
        names = {
            "id2label": dict(enumerate(c.labels)),
            "label2id": {name: i for i, name in enumerate(c.labels)},
        }
        kind_of = "regression" if len(c.labels) == 1 else "single_label_classification"
        eos = extra.get(
            "eos_token_id"
        )  # theirs finds each row's last token by what is no padding, so there must be some
        extra = {
            "pad_token_id": eos[0] if isinstance(eos, list) else eos,
            **extra,
            **names,
            "problem_type": kind_of,
        }
    return {
        "architectures": [architecture],
        "model_type": kind,
        **family.write(c, kind),
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "torch_dtype": dtype,
        **extra,
    }
