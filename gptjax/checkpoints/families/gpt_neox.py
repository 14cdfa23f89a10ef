"""GPT-NeoX and Pythia (`model_type` gpt_neox): RoPE on a part of each head, parallel residuals."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import (
    ACTIVATIONS,
    Family,
    choose,
    first_name,
    has_gpt2_shape,
    has_other_scores,
    read_rope,
    read_sizes,
    write_sizes,
)
from gptjax.checkpoints.families.config_keys import ROPE_KEYS, config_table
from gptjax.checkpoints.tensor_map import (
    RawConfig,
    TensorMap,
    head_maps,
    linear,
    neox_qkv,
    norm_maps,
    same,
    table,
)
from gptjax.config.schema import ModelConfig

_DEFAULTS = {
    "num_hidden_layers": 44,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
    "vocab_size": 50432,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "attention_bias": True,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def _tensor_maps(config: ModelConfig) -> list[TensorMap]:
    block = "gpt_neox.layers.{}."
    maps = [
        table("embed/tokens", "gpt_neox.embed_in.weight"),
        *norm_maps("final_norm", "gpt_neox.final_layer_norm", bias=True),
        *norm_maps("blocks/norm1", block + "input_layernorm", bias=True),
        *norm_maps("blocks/norm2", block + "post_attention_layernorm", bias=True),
        neox_qkv("blocks/attn/qkv/kernel", block + "attention.query_key_value.weight"),
    ]
    attention_bias = config.bias == "all"
    if attention_bias:
        maps.append(neox_qkv("blocks/attn/qkv/bias", block + "attention.query_key_value.bias"))
    for layer, module, inputs, bias in (
        ("blocks/attn/out", "attention.dense", 2, attention_bias),
        ("blocks/mlp/up", "mlp.dense_h_to_4h", 1, True),
        ("blocks/mlp/down", "mlp.dense_4h_to_h", 1, True),
    ):
        maps.append(linear(f"{layer}/kernel", f"{block}{module}.weight", inputs=inputs))
        if bias:
            maps.append(same(f"{layer}/bias", f"{block}{module}.bias"))
    return maps + head_maps(config, "embed_out.weight")


def _read_config(raw: RawConfig) -> dict[str, Any]:
    fraction = raw.get("rotary_pct") or raw.get("partial_rotary_factor") or 0.25
    return {
        **read_sizes(raw),
        **read_rope(raw, theta=raw.get("rotary_emb_base"), fraction=fraction),
        "norm_eps": raw["layer_norm_eps"],
        "parallel": raw["use_parallel_residual"],
        "mlp": choose(raw, "hidden_act", ACTIVATIONS),
        "bias": "all" if raw["attention_bias"] else "mlp",
    }


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "hidden_act": first_name(ACTIVATIONS, config.mlp),
        "attention_bias": config.bias == "all",
    }


def _matches(config: ModelConfig) -> bool:
    return (
        has_gpt2_shape(config)
        and config.positions == "rope"
        and config.bias in ("all", "mlp")
        and not has_other_scores(config)
    )


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    defaults=_DEFAULTS,
    keys=config_table("gpt_neox", {*_DEFAULTS, *ROPE_KEYS, "rotary_pct", "rotary_emb_base"}),
    read_config=_read_config,
    write_config=_write_config,
    tensor_maps=_tensor_maps,
    matches=_matches,
)
