"""Llama and its relatives: Mistral, Qwen2, Qwen3. (SmolLM2 and many others call themselves Llama.)

All have RoPE, RMSNorm and SwiGLU. They differ in biases, in the sliding window, and in whether
queries and keys are normalised, so each is Llama's functions with a few lines more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.checkpoints.families.common import (
    Family,
    GgufNames,
    choose,
    has_llama_shape,
    read_rope,
    read_sizes,
    write_sizes,
)
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
    if config.bias != "none":
        maps.append(split_qkv("blocks/attn/qkv/bias", f"{q}.bias", f"{k}.bias", f"{v}.bias"))
    if config.qk_norm:
        maps += norm_maps("blocks/attn/q_norm", block + "self_attn.q_norm", bias=False)
        maps += norm_maps("blocks/attn/k_norm", block + "self_attn.k_norm", bias=False)
    maps.append(linear("blocks/attn/out/kernel", block + "self_attn.o_proj.weight", inputs=2))
    if config.bias == "attention":
        maps.append(same("blocks/attn/out/bias", block + "self_attn.o_proj.bias"))
    gate, up = block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"
    maps.append(split_gate_up("blocks/mlp/gate_up/kernel", gate, up))
    maps.append(linear("blocks/mlp/down/kernel", block + "mlp.down_proj.weight"))
    return maps + head_maps(config, "lm_head.weight")


def _read_llama(raw: RawConfig) -> dict[str, Any]:
    choose(raw, "hidden_act", {"silu": "swiglu"}, "silu")
    if raw.get("mlp_bias"):
        raise UserError("config.json: mlp_bias = true is not supported in this family")
    return {
        **read_sizes(raw),
        **read_rope(raw),
        "kv_heads": raw.get("num_key_value_heads") or 0,
        "head_dim": raw.get("head_dim") or 0,
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "bias": "attention" if raw.get("attention_bias", False) else "none",
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def _read_mistral(raw: RawConfig) -> dict[str, Any]:
    return {**_read_llama(raw), "sliding_window": raw.get("sliding_window") or 0}


def _read_qwen2(raw: RawConfig) -> dict[str, Any]:
    return {**_read_llama(raw), "bias": "qkv", "sliding_window": _read_qwen_window(raw)}


def _read_qwen3(raw: RawConfig) -> dict[str, Any]:
    return {
        **_read_llama(raw),
        "head_dim": raw.get("head_dim") or 128,
        "qk_norm": True,
        "sliding_window": _read_qwen_window(raw),
    }


def _read_qwen_window(raw: RawConfig) -> int:
    """Qwen's layers from `max_window_layers` on have the window: all or none of them, here."""
    layer_types = raw.get("layer_types")
    if not layer_types:
        first_with_window = raw.get("max_window_layers", 28)
        layer_types = ["full_attention"] if first_with_window > 0 else []
        if first_with_window < raw["num_hidden_layers"]:
            layer_types = [*layer_types, "sliding_attention"]
    window = raw.get("sliding_window") or 0
    if not window or not raw.get("use_sliding_window") or "sliding_attention" not in layer_types:
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
        "hidden_act": "silu",
        "attention_bias": config.bias == "attention",
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
    biases = config.bias in ("none", "attention")
    return _is_relative(config) and biases and not config.qk_norm and not config.sliding_window


def _is_mistral(config: ModelConfig) -> bool:
    window = config.sliding_window > 0
    return _is_relative(config) and config.bias == "none" and not config.qk_norm and window


def _is_qwen2(config: ModelConfig) -> bool:
    square = config.head_width * config.heads == config.width
    return _is_relative(config) and config.bias == "qkv" and not config.qk_norm and square


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
    read_config=_read_mistral,
    write_config=_write_mistral,
    matches=_is_mistral,
    gguf=None,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=_read_qwen2,
    write_config=_write_qwen,
    matches=_is_qwen2,
    gguf=GgufNames("qwen2", _GGUF_MODULES),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read_qwen3,
    write_config=_write_qwen,
    matches=_is_qwen3,
    gguf=GgufNames("qwen3", _GGUF_MODULES),
)
