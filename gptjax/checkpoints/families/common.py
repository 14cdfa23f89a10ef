"""What a model family is, and what the `config.json` of several families have in common.

A `Family` is all that is known of one `model_type` of Hugging Face: how its config reads and is
written, and which of its tensors hold which parameters.

To add a family, write `families/<name>.py` with a `Family` (the smallest is `gpt_neox.py`) and add
it to `FAMILIES` in `checkpoints/huggingface.py`. Reading, writing, adapters (PEFT), conversion and
the tests of round trips work from those. If the model computes something new, add a setting to
`ModelConfig` and the computation to `model/`; a config that needs what is not there is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.checkpoints.tensor_map import RawConfig, TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class GgufNames:
    """How llama.cpp names the same model.

    architecture: `general.architecture` of the file.
    modules: {module's name in Hugging Face, without its layer: name in GGUF}.
    neighbours_rotate: rows of q and k are reordered, because RoPE turns neighbouring dims there.
    sliding_window: whether files of this architecture have a setting for it.
    """

    architecture: str
    modules: Mapping[str, str]
    neighbours_rotate: bool = False
    sliding_window: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family of Hugging Face.

    model_type, architecture: as in config.json; the architecture is the language model's class.
    prefix: begins the names of tensors; absent in files that hold the decoder without a head.
    read_config: a config.json -> settings of `ModelConfig`. Raises UserError or KeyError.
    write_config: a config -> the keys that `read_config` reads, apart from the common ones.
    tensor_maps: a config -> a map for each parameter, in the order in which files are written.
    matches: whether the family can hold a model of this config. The first one that does is used.
    kernels_in_out: kernels are [in, out] (GPT-2's Conv1D) and not [out, in].
    gguf: its names in GGUF files; None where we neither read nor write it there.
    """

    model_type: str
    architecture: str
    prefix: str
    read_config: Callable[[RawConfig], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    tensor_maps: Callable[[ModelConfig], list[TensorMap]]
    matches: Callable[[ModelConfig], bool]
    kernels_in_out: bool = False
    gguf: GgufNames | None = None


# {activation in config.json: setting model.mlp}
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}


def choose(raw: RawConfig, key: str, options: Mapping[Any, str], default: Any = None) -> str:
    """The option that `raw[key]` names. Raises UserError, with the known names, for another."""
    value = raw.get(key, default)
    if value not in options:
        known = ", ".join(map(str, options))
        raise UserError(f"config.json: {key} = {value!r} is not supported; known: {known}")
    return options[value]


def read_sizes(raw: RawConfig) -> dict[str, Any]:
    """The sizes, under the names that all families but GPT-2 use."""
    return {
        "layers": raw["num_hidden_layers"],
        "width": raw["hidden_size"],
        "heads": raw["num_attention_heads"],
        "mlp_dim": raw["intermediate_size"],
        "context": raw["max_position_embeddings"],
        "vocab_size": raw["vocab_size"],
        "init_std": raw.get("initializer_range", 0.02),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    """What `read_sizes` and `read_rope` read."""
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        **write_rope(config),
    }


def read_rope(raw: RawConfig, *, default_fraction: float = 1.0) -> dict[str, Any]:
    """The settings of RoPE. Raises UserError for a scaling of contexts that is not supported.

    Both spellings are read: `rope_parameters` (transformers 5), and `rope_theta` with
    `rope_scaling` (transformers 4; GPT-NeoX has names of its own).
    """
    rope = {
        "rope_theta": raw.get("rope_theta") or raw.get("rotary_emb_base"),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }
    fraction = (
        rope.get("partial_rotary_factor")
        or raw.get("partial_rotary_factor")
        or raw.get("rotary_pct")
        or default_fraction
    )
    return {
        "positions": "rope",
        "rope_theta": float(rope["rope_theta"] or 10_000.0),
        "rotary_fraction": float(fraction),
        **_read_rope_scaling(rope, raw["max_position_embeddings"]),
    }


def _read_rope_scaling(rope: RawConfig, context: int) -> dict[str, Any]:
    """The settings of an extended context; empty without one."""
    scaling = rope.get("rope_type", rope.get("type", "default"))
    # dynamic scaling changes nothing up to the context, and we refuse longer texts
    if scaling in ("default", "dynamic", None):
        return {}
    if scaling not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"config.json: RoPE scaling {scaling!r} is not supported; "
            "known: default, dynamic, linear, llama3, yarn"
        )
    settings = {"rope_scaling": scaling, "rope_factor": float(rope["factor"])}
    if scaling != "linear":
        settings["rope_original_context"] = rope.get("original_max_position_embeddings") or context
    if scaling == "llama3":
        settings["rope_low_freq_factor"] = float(rope["low_freq_factor"])
        settings["rope_high_freq_factor"] = float(rope["high_freq_factor"])
    if scaling == "yarn":
        if not rope.get("truncate", True) or rope.get("mscale"):
            raise UserError("config.json: yarn with truncate = false or mscale is not supported")
        settings["rope_beta_fast"] = float(rope.get("beta_fast") or 32)
        settings["rope_beta_slow"] = float(rope.get("beta_slow") or 1)
        settings["rope_attention_factor"] = float(rope.get("attention_factor") or 0.0)
    return settings


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """What `read_rope` reads, in the spelling of transformers 4, which 5 reads too."""
    if config.rope_scaling == "none":
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = config.rope_original_context
    if config.rope_scaling == "llama3":
        scaling["low_freq_factor"] = config.rope_low_freq_factor
        scaling["high_freq_factor"] = config.rope_high_freq_factor
    if config.rope_scaling == "yarn":
        scaling["beta_fast"] = config.rope_beta_fast
        scaling["beta_slow"] = config.rope_beta_slow
        if config.rope_attention_factor:
            scaling["attention_factor"] = config.rope_attention_factor
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def has_gpt2_shape(config: ModelConfig) -> bool:
    """Whether GPT-2 or GPT-NeoX could hold the model, by all but its positions."""
    return (
        config.norm == "layernorm"
        and config.mlp in ("gelu", "gelu_exact")
        and config.bias == "all"
        and config.kv == config.heads
        and config.head_width * config.heads == config.width
        and not config.sliding_window
        and not config.qk_norm
        and not has_gemma_settings(config)
    )


def has_llama_shape(config: ModelConfig) -> bool:
    """Whether Llama or Phi-3 could hold the model, but for biases, window, norms of q and k."""
    return (
        config.positions == "rope"
        and config.norm == "rmsnorm"
        and config.mlp == "swiglu"
        and not config.parallel
        and not has_gemma_settings(config)
    )


def has_gemma_settings(config: ModelConfig) -> bool:
    """Whether the model computes something that only Gemma does."""
    return bool(
        config.norm_plus_one
        or config.post_norms
        or config.scale_embeddings
        or config.alternate_windows
        or config.query_pre_attn_scalar
        or config.attention_softcap
        or config.logit_softcap
    )
