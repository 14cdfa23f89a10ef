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
from gptjax.checkpoints.generation_config import is_generation_key
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
BUFFERS = re.compile(
    r"(.*\.)?(attn|attention)\.(bias|masked_bias)"
    r"|(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)


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
    """A file `config.json` as a ModelConfig.

    An absent key means what transformers takes for that model type. Raises UserError for an
    unknown architecture, a key that cannot be honoured or a value that makes no sense.
    """
    family = family_named(raw.get("model_type"))
    of_the_model = {key: raw[key] for key in raw if not is_generation_key(key)}
    family.keys.check(of_the_model, "config.json")
    return read_settings(raw)


def read_settings(raw: RawConfig) -> ModelConfig:
    """`read_config` of the keys that are known, whatever file they come from. Raises UserError."""
    family = family_named(raw.get("model_type"))
    raw = {**family.defaults, **raw}
    try:
        settings = {
            "vocab_size": raw["vocab_size"],
            "init_std": raw["initializer_range"],
            "tie_embeddings": raw["tie_word_embeddings"],
            **family.read_config(raw),
            **_read_head(raw),
        }
        return build.build_config({"model": settings}).model
    except KeyError as error:
        model = f"a {family.model_type} model"
        raise UserError(f"config.json has no {error}, which {model} needs") from None
    except UserError as error:
        raise UserError(f"config.json: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json holds a value of a wrong type: {error}") from None


def family_named(model_type: Any) -> Family:
    """The family of this `model_type`. Raises UserError."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(
        f"config.json: no architecture {str(model_type)!r} (model_type) here; there are: "
        f"{', '.join(FAMILIES)}"
    )


# What ends the names of architectures whose heads are read; `Model` has none.
_HEADS = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "Model")


def _read_head(raw: RawConfig) -> dict[str, Any]:
    """The settings of a classifier's head; empty of a language model. Raises UserError."""
    architectures = [str(name) for name in raw.get("architectures") or []]
    if not architectures:
        return {}
    for name in architectures:
        if not name.endswith(_HEADS) or name.endswith("DoubleHeadsModel"):
            raise UserError(
                f"architectures = {architectures}: a head of this kind is not read here; language "
                "models (...ForCausalLM) and classifiers of texts (...ForSequenceClassification) "
                "are.\nThe decoder alone, without the head, may be saved in transformers: "
                "model.base_model.save_pretrained(FOLDER)"
            )
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return {}
    labels = _read_labels(raw)
    problem = raw.get("problem_type") or ""
    known = ("single_label_classification", "multi_label_classification", "regression")
    if problem and problem not in known:
        raise UserError(unknown_name("problem_type", str(problem), list(known)))
    if problem == "single_label_classification" and len(labels) == 1:
        raise UserError(
            f"problem_type = 'single_label_classification' with one label, {labels[0]!r}: one of "
            "one is always certain. A number is problem_type = 'regression'"
        )
    return {"labels": labels, "problem_type": problem}


def _read_labels(raw: RawConfig) -> list[str]:
    """Names of the classes, by their numbers. Raises UserError where they are not clear."""
    count, names = raw.get("num_labels"), raw.get("id2label")
    if names is None:
        return [f"LABEL_{i}" for i in range(2 if count is None else count)]
    if not isinstance(names, Mapping) or not names:
        raise UserError(f"id2label = {names!r} is no table of {{number: name}}")
    try:
        by_number = {int(number): name for number, name in names.items()}
    except ValueError:
        raise UserError(f"id2label = {dict(names)!r} has a key that is no number") from None
    if sorted(by_number) != list(range(len(names))):
        raise UserError(
            f"id2label numbers its {len(names)} labels {sorted(by_number)}: they must be 0 to "
            f"{len(names) - 1}, each once, as the rows of score.weight"
        )
    if count is not None and count != len(names):
        raise UserError(f"num_labels = {count} and id2label has {len(names)}: make them agree")
    if wrong := [name for name in by_number.values() if not isinstance(name, str | int)]:
        raise UserError(f"id2label names a label {wrong[0]!r}, which is no text")
    labels = [str(by_number[i]) for i in range(len(names))]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise UserError(
                f"id2label gives the name {label!r} to {labels.index(label)} and to {i}: "
                "give each label a name of its own"
            )
        number = (raw.get("label2id") or {}).get(label, i)
        if number != i:
            raise UserError(
                f"id2label gives {label!r} the number {i} and label2id {number}: make them agree"
            )
    return labels


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
    return {
        "pad_token_id": eos[0] if isinstance(eos, list) else eos,
        **extra,
        "id2label": dict(enumerate(config.labels)),
        "label2id": {name: i for i, name in enumerate(config.labels)},
        "problem_type": config.problem,
    }
