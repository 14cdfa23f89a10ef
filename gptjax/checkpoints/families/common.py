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
import math
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.checkpoints.tensor_map import RawConfig, TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.foreign_keys import KeyTable, Refusal


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
    defaults: {key of config.json: what transformers takes where it is absent}.
    keys: what becomes of every key of config.json (`config_keys.config_table`).
    read_config: a config.json, completed by `defaults` -> settings of `ModelConfig`. Raises
        UserError or KeyError.
    write_config: a config -> the keys that `read_config` reads, apart from the common ones.
    tensor_maps: a config -> a map for each parameter, in the order in which files are written.
    matches: whether the family can hold a model of this config. The first one that does is used.
    kernels_in_out: kernels are [in, out] (GPT-2's Conv1D) and not [out, in].
    gguf: its names in GGUF files; None where we neither read nor write it there.
    """

    model_type: str
    architecture: str
    prefix: str
    defaults: Mapping[str, Any]
    keys: KeyTable
    read_config: Callable[[RawConfig], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    tensor_maps: Callable[[ModelConfig], list[TensorMap]]
    matches: Callable[[ModelConfig], bool]
    kernels_in_out: bool = False
    gguf: GgufNames | None = None


# {activation in config.json: setting model.mlp}; a setting is written as its first name.
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu_fast": "geglu",
}


def choose(raw: RawConfig, key: str, options: Mapping[Any, str]) -> str:
    """The option that `raw[key]` names. Raises UserError, with the known names, for another."""
    value = raw[key]
    if value not in options:
        known = ", ".join(map(str, options))
        raise UserError(f"config.json: {key} = {value!r} is not supported; known: {known}")
    return options[value]


def first_name(options: Mapping[str, str], option: str) -> str:
    """The inverse of `choose`."""
    return next(name for name, value in options.items() if value == option)


def read_sizes(raw: RawConfig) -> dict[str, Any]:
    """The sizes, under the names that all families but GPT-2 use."""
    return {
        "layers": raw["num_hidden_layers"],
        "width": raw["hidden_size"],
        "heads": raw["num_attention_heads"],
        "mlp_dim": raw["intermediate_size"],
        "context": raw["max_position_embeddings"],
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


_OTHER_SCALING = "only the scalings default, dynamic, linear, llama3 and yarn are supported"

ROPE_SCALING = KeyTable(
    "rope_scaling and rope_parameters in config.json",
    used=frozenset(
        {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
        | {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
        | {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}
    ),
    no_effect={"finetuned": "who wrote the file"},
    refused={
        "truncate": Refusal("yarn rounds its range of dimensions here", unless=(True,)),
        "extrapolation_factor": Refusal(_OTHER_SCALING, unless=(1, 1.0)),
        "attn_factor": Refusal(_OTHER_SCALING, unless=(1, 1.0)),
        "alpha": Refusal(_OTHER_SCALING),
        "short_factor": Refusal(_OTHER_SCALING),
        "long_factor": Refusal(_OTHER_SCALING),
        "short_mscale": Refusal(_OTHER_SCALING),
        "long_mscale": Refusal(_OTHER_SCALING),
        "mrope_section": Refusal("positions are those of text"),
        "mrope_interleaved": Refusal("positions are those of text"),
        "full_attention": Refusal("all layers share one RoPE here"),
        "sliding_attention": Refusal("all layers share one RoPE here"),
    },
)


def read_rope(
    raw: RawConfig, *, theta: float | None = None, fraction: float | None = None
) -> dict[str, Any]:
    """The settings of RoPE. Raises UserError for a scaling of contexts that is not supported.

    Both spellings are read: `rope_parameters` (transformers 5), and `rope_theta` with
    `rope_scaling` (transformers 4), which goes first where a file has both. theta, fraction: from
    further keys of a family.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    scaling = _read_rope_scaling(rope, raw)
    ROPE_SCALING.check(rope, "config.json: RoPE")
    theta = rope.get("rope_theta") or theta or raw.get("rope_theta") or 10_000.0
    fraction = (
        rope.get("partial_rotary_factor") or fraction or raw.get("partial_rotary_factor") or 1.0
    )
    return {
        "positions": "rope",
        "rope_theta": float(theta),
        "rotary_fraction": float(fraction),
        **scaling,
    }


def _read_rope_scaling(rope: RawConfig, raw: RawConfig) -> dict[str, Any]:
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
    context = raw["max_position_embeddings"]
    # next to the scaling or in it, in this order (transformers 5)
    original = raw.get("original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings") or context
    factor = rope.get("factor") if scaling == "yarn" else rope["factor"]
    factor = context / original if factor is None else float(factor)
    settings = {"rope_scaling": scaling, "rope_factor": factor}
    if scaling != "linear":
        settings["rope_original_context"] = original
    if scaling == "llama3":
        settings["rope_low_freq_factor"] = float(rope["low_freq_factor"])
        settings["rope_high_freq_factor"] = float(rope["high_freq_factor"])
    if scaling == "yarn":
        settings["rope_beta_fast"] = float(rope.get("beta_fast") or 32)
        settings["rope_beta_slow"] = float(rope.get("beta_slow") or 1)
        settings["rope_attention_factor"] = _yarn_attention_factor(rope, factor)
    return settings


def _yarn_attention_factor(rope: RawConfig, factor: float) -> float:
    """What the file says, by itself or by its two `mscale`; 0 for YaRN's usual one."""
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is None and scale and scale_all:
        return (1 + 0.1 * scale * math.log(factor)) / (1 + 0.1 * scale_all * math.log(factor))
    return float(rope.get("attention_factor") or 0.0)


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
    """Whether GPT-2 or GPT-NeoX could hold the model, but for positions, biases and scores."""
    return (
        config.norm == "layernorm"
        and config.mlp in ACTIVATIONS.values()
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
        and config.mlp in GATED_ACTIVATIONS.values()
        and not config.parallel
        and not has_other_scores(config)
        and not has_gemma_settings(config)
    )


def has_other_scores(config: ModelConfig) -> bool:
    """Whether scores of attention are divided by more or less than the root of the head's width."""
    return bool(config.query_pre_attn_scalar or config.scale_scores_by_layer)


def has_gemma_settings(config: ModelConfig) -> bool:
    """Whether the model computes something that only Gemma does."""
    return bool(
        config.norm_plus_one
        or config.post_norms
        or config.scale_embeddings
        or config.alternate_windows
        or config.attention_softcap
        or config.logit_softcap
    )
