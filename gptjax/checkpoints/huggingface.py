"""The `config.json` of Hugging Face checkpoints as a ModelConfig, and back.

Both spellings of configs are read, transformers 4's and 5's. To add a family, see
`families/common.py`; its row goes into `FAMILIES` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gptjax.checkpoints.families.common import Family
from gptjax.checkpoints.families.gemma2 import GEMMA2
from gptjax.checkpoints.families.gpt2 import GPT2
from gptjax.checkpoints.families.gpt_neox import GPT_NEOX
from gptjax.checkpoints.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from gptjax.checkpoints.families.phi3 import PHI3
from gptjax.checkpoints.tensor_map import RawConfig
from gptjax.config import build
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig

# By `model_type`. Where several hold a model, the first one writes it.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (GPT2, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2)
}

# Tensors of old files that hold no parameters: masks of GPT-2 and NeoX, RoPE's frequencies.
BUFFERS = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


def family_of(config: ModelConfig) -> Family:
    """The family that holds a model of this config: `config.family`, or the first one that does.

    Raises UserError where none does.
    """
    families = [FAMILIES[config.family]] if config.family else FAMILIES.values()
    for family in families:
        if family.matches(config):
            return family
    raise UserError(
        f"no Hugging Face architecture holds this model (positions {config.positions}, "
        f"norm {config.norm}, mlp {config.mlp}, bias {config.bias}, "
        f"window {config.sliding_window}, softcap {config.logit_softcap});\n"
        f"known: {', '.join(FAMILIES)}. Keep it as a workdir: --format=gptjax"
    )


def read_config(raw: RawConfig) -> ModelConfig:
    """`config.json` as a ModelConfig.

    Raises UserError for an unknown architecture, a missing key or a value that makes no sense.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: {unknown_name('architecture', str(model_type), list(FAMILIES))}"
        )
    try:
        settings = {**FAMILIES[model_type].read_config(raw), "labels": _read_labels(raw)}
        return build.build_config({"model": settings}).model
    except KeyError as error:
        raise UserError(f"config.json has no {error}, which a {model_type} model needs") from None
    except UserError as error:
        raise UserError(f"config.json: {error}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json holds a value of a wrong type: {error}") from None


def _read_labels(raw: RawConfig) -> list[str]:
    """Names of the classes of a `...ForSequenceClassification`; none of a language model."""
    architectures = raw.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return []
    names = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}
    return [str(names[key]) for key in sorted(names, key=int)]


def write_config(config: ModelConfig, dtype: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a model. extra: ids of special tokens and other keys to keep."""
    family = family_of(config)
    architecture = family.architecture
    if config.labels:
        architecture = re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", architecture)
        extra = _classifier_keys(config, extra)
    return {
        "architectures": [architecture],
        "model_type": family.model_type,
        **family.write_config(config),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
        **extra,
    }


def _classifier_keys(config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` with the labels and a padding token.

    transformers takes the last token that is not padding as the end of a row, so it needs one.
    """
    eos = extra.get("eos_token_id")
    one_number = len(config.labels) == 1
    return {
        "pad_token_id": eos[0] if isinstance(eos, list) else eos,
        **extra,
        "id2label": dict(enumerate(config.labels)),
        "label2id": {name: i for i, name in enumerate(config.labels)},
        "problem_type": "regression" if one_number else "single_label_classification",
    }
