"""GPT-NeoX and Pythia (`model_type` gpt_neox): RoPE on a part of each head, parallel residuals."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import (
    GELUS,
    Family,
    choose,
    has_gpt2_shape,
    read_rope,
    read_sizes,
    write_sizes,
)
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
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig


def _tensor_maps(config: ModelConfig) -> list[TensorMap]:
    block = "gpt_neox.layers.{}."
    maps = [
        table("embed/tokens", "gpt_neox.embed_in.weight"),
        *norm_maps("final_norm", "gpt_neox.final_layer_norm", bias=True),
        *norm_maps("blocks/norm1", block + "input_layernorm", bias=True),
        *norm_maps("blocks/norm2", block + "post_attention_layernorm", bias=True),
        neox_qkv("blocks/attn/qkv/kernel", block + "attention.query_key_value.weight"),
        neox_qkv("blocks/attn/qkv/bias", block + "attention.query_key_value.bias"),
    ]
    for layer, module, inputs in (
        ("blocks/attn/out", "attention.dense", 2),
        ("blocks/mlp/up", "mlp.dense_h_to_4h", 1),
        ("blocks/mlp/down", "mlp.dense_4h_to_h", 1),
    ):
        maps.append(linear(f"{layer}/kernel", f"{block}{module}.weight", inputs=inputs))
        maps.append(same(f"{layer}/bias", f"{block}{module}.bias"))
    return maps + head_maps(config, "embed_out.weight")


def _read_config(raw: RawConfig) -> dict[str, Any]:
    if not raw.get("attention_bias", True):
        raise UserError("config.json: attention_bias = false is not supported in GPT-NeoX")
    return {
        **read_sizes(raw),
        **read_rope(raw, default_fraction=0.25),
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "parallel": raw.get("use_parallel_residual", True),
        "mlp": choose(raw, "hidden_act", GELUS, "gelu"),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "hidden_act": "gelu_new" if config.mlp == "gelu" else "gelu",
        "attention_bias": True,
    }


def _matches(config: ModelConfig) -> bool:
    return has_gpt2_shape(config) and config.positions == "rope"


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    read_config=_read_config,
    write_config=_write_config,
    tensor_maps=_tensor_maps,
    matches=_matches,
)
