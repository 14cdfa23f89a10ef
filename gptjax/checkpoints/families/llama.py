"""Llama and its relatives: Mistral, Qwen2, Qwen3. (SmolLM2 and many others call themselves Llama.)

All have RoPE, RMSNorm and SwiGLU. They differ in biases, in the sliding window, and in whether
queries and keys are normalised, so each is Llama's functions with a few lines more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.checkpoints.families.common import (
    GATED_ACTIVATIONS,
    Family,
    GgufNames,
    choose,
    first_name,
    has_llama_shape,
    read_rope,
    read_sizes,
    write_sizes,
)
from gptjax.checkpoints.families.config_keys import ROPE_KEYS, TENSORS_TELL, config_table
from gptjax.checkpoints.tensor_map import (
    RawConfig,
    TensorMap,
    head_maps,
    linear,
    norm_maps,
    same,
    split_gate_up,
    split_qkv,
    table,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.foreign_keys import KeyTable, Refusal

_DEFAULTS = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}

_LLAMA_DEFAULTS = {**_DEFAULTS, "attention_bias": False, "mlp_bias": False}

_MISTRAL_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

_QWEN2_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

_QWEN3_DEFAULTS = {**_QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}

# {(attention_bias, mlp_bias): model.bias}
_BIASES = {
    (False, False): "none",
    (True, False): "attention",
    (False, True): "mlp",
    (True, True): "all",
}
_NO_BIAS = Refusal("this family has none there")


def _table(model_type: str, defaults: dict[str, Any]) -> KeyTable:
    """The keys of one of the relatives: those that it reads, and what the others have."""
    others = {
        "attention_bias": _NO_BIAS,
        "mlp_bias": _NO_BIAS,
        "sliding_window": Refusal("Llama has no window; Mistral has (model_type)"),
        "layer_types": Refusal("all layers of this family are alike"),
        "use_sliding_window": Refusal("it is a key of Qwen"),
    }
    no_effect = {}
    if model_type == "qwen2":
        no_effect = {
            **dict.fromkeys(("attention_bias", "qkv_bias"), TENSORS_TELL),
            "dual_chunk_attention_config": "transformers and this model attend to all of a text",
        }
    refused = {key: others[key] for key in others if key not in {*defaults, *no_effect}}
    refused["partial_rotary_factor"] = Refusal("this family turns all of a head", unless=(1, 1.0))
    return config_table(model_type, {*defaults, *ROPE_KEYS}, no_effect=no_effect, refused=refused)


def _tensor_maps(config: ModelConfig) -> list[TensorMap]:
    block = "model.layers.{}."
    q, k, v = (f"{block}self_attn.{name}_proj" for name in "qkv")
    maps = [
        table("embed/tokens", "model.embed_tokens.weight"),
        *norm_maps("final_norm", "model.norm", bias=False),
        *norm_maps("blocks/norm1", block + "input_layernorm", bias=False),
        *norm_maps("blocks/norm2", block + "post_attention_layernorm", bias=False),
        split_qkv("blocks/attn/qkv/kernel", f"{q}.weight", f"{k}.weight", f"{v}.weight"),
    ]
    if config.bias in ("all", "attention", "qkv"):
        maps.append(split_qkv("blocks/attn/qkv/bias", f"{q}.bias", f"{k}.bias", f"{v}.bias"))
    if config.qk_norm:
        maps += norm_maps("blocks/attn/q_norm", block + "self_attn.q_norm", bias=False)
        maps += norm_maps("blocks/attn/k_norm", block + "self_attn.k_norm", bias=False)
    maps.append(linear("blocks/attn/out/kernel", block + "self_attn.o_proj.weight", inputs=2))
    if config.bias in ("all", "attention"):
        maps.append(same("blocks/attn/out/bias", block + "self_attn.o_proj.bias"))
    gate, up = block + "mlp.gate_proj", block + "mlp.up_proj"
    maps.append(split_gate_up("blocks/mlp/gate_up/kernel", f"{gate}.weight", f"{up}.weight"))
    maps.append(linear("blocks/mlp/down/kernel", block + "mlp.down_proj.weight"))
    if config.bias in ("all", "mlp"):
        maps.append(split_gate_up("blocks/mlp/gate_up/bias", f"{gate}.bias", f"{up}.bias"))
        maps.append(same("blocks/mlp/down/bias", block + "mlp.down_proj.bias"))
    return maps + head_maps(config, "lm_head.weight")


def _read_relative(raw: RawConfig) -> dict[str, Any]:
    """What all of them have."""
    return {
        **read_sizes(raw),
        **read_rope(raw),
        "kv_heads": raw["num_key_value_heads"] or 0,
        "head_dim": raw["head_dim"] or 0,
        "norm": "rmsnorm",
        "norm_eps": raw["rms_norm_eps"],
        "mlp": choose(raw, "hidden_act", GATED_ACTIVATIONS),
        "bias": "none",
    }


def _read_llama(raw: RawConfig) -> dict[str, Any]:
    bias = _BIASES[bool(raw["attention_bias"]), bool(raw["mlp_bias"])]
    return {**_read_relative(raw), "bias": bias}


def _read_mistral(raw: RawConfig) -> dict[str, Any]:
    return {**_read_relative(raw), "sliding_window": raw["sliding_window"] or 0}


def _read_qwen2(raw: RawConfig) -> dict[str, Any]:
    return {**_read_relative(raw), "bias": "qkv", "sliding_window": _read_qwen_window(raw)}


def _read_qwen3(raw: RawConfig) -> dict[str, Any]:
    return {
        **_read_relative(raw),
        "bias": "attention" if raw["attention_bias"] else "none",
        "qk_norm": True,
        "sliding_window": _read_qwen_window(raw),
    }


def _read_qwen_window(raw: RawConfig) -> int:
    """Qwen's layers from `max_window_layers` on have the window: all or none of them, here."""
    layer_types = raw["layer_types"]
    if not layer_types:
        first_with_window = raw["max_window_layers"]
        layer_types = ["full_attention"] if first_with_window > 0 else []
        if first_with_window < raw["num_hidden_layers"]:
            layer_types = [*layer_types, "sliding_attention"]
    window = raw["sliding_window"] or 0
    if not window or not raw["use_sliding_window"] or "sliding_attention" not in layer_types:
        return 0
    if "full_attention" in layer_types:
        raise UserError(
            "config.json: layers with and without a sliding window in one model are not "
            "supported; set use_sliding_window to false if texts are short"
        )
    return window


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "num_key_value_heads": config.kv,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": first_name(GATED_ACTIVATIONS, config.mlp),
        "attention_bias": config.bias in ("all", "attention"),
        "mlp_bias": config.bias in ("all", "mlp"),
    }


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_write_llama(config), "sliding_window": config.sliding_window}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_llama(config),
        "sliding_window": config.sliding_window or None,
        "use_sliding_window": bool(config.sliding_window),
        "max_window_layers": 0 if config.sliding_window else config.layers,
    }


def _is_relative(config: ModelConfig) -> bool:
    return has_llama_shape(config) and config.rotary_fraction == 1.0


def _is_llama(config: ModelConfig) -> bool:
    biased = config.bias in _BIASES.values()
    return _is_relative(config) and biased and not config.qk_norm and not config.sliding_window


def _is_mistral(config: ModelConfig) -> bool:
    window = config.sliding_window > 0
    return _is_relative(config) and config.bias == "none" and not config.qk_norm and window


def _is_qwen2(config: ModelConfig) -> bool:
    return _is_relative(config) and config.bias == "qkv" and not config.qk_norm


def _is_qwen3(config: ModelConfig) -> bool:
    return _is_relative(config) and config.bias in ("none", "attention") and config.qk_norm


_GGUF_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    defaults=_LLAMA_DEFAULTS,
    keys=_table("llama", _LLAMA_DEFAULTS),
    read_config=_read_llama,
    write_config=_write_llama,
    tensor_maps=_tensor_maps,
    matches=_is_llama,
    gguf=GgufNames("llama", _GGUF_MODULES, neighbours_rotate=True),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults=_MISTRAL_DEFAULTS,
    keys=_table("mistral", _MISTRAL_DEFAULTS),
    read_config=_read_mistral,
    write_config=_write_mistral,
    matches=_is_mistral,
    gguf=None,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=_QWEN2_DEFAULTS,
    keys=_table("qwen2", _QWEN2_DEFAULTS),
    read_config=_read_qwen2,
    write_config=_write_qwen,
    matches=_is_qwen2,
    gguf=GgufNames("qwen2", _GGUF_MODULES),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=_QWEN3_DEFAULTS,
    keys=_table("qwen3", _QWEN3_DEFAULTS),
    read_config=_read_qwen3,
    write_config=_write_qwen,
    matches=_is_qwen3,
    gguf=GgufNames("qwen3", _GGUF_MODULES),
)
