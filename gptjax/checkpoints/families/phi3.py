"""Phi-3 and Phi-4 (`model_type` phi3): a Llama with q, k, v in one tensor, and gate, up in one.

RoPE may turn a part of each head only (Phi-4-mini). The scaling "longrope" of the 128k models is
refused by name: it changes the angles of all tokens once a text passes a length, which no cache of
rotated keys can follow.
"""

from __future__ import annotations

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
from gptjax.checkpoints.families.config_keys import ROPE_KEYS, config_table
from gptjax.checkpoints.tensor_map import (
    RawConfig,
    TensorMap,
    head_maps,
    linear,
    norm_maps,
    stacked_qkv,
    table,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.foreign_keys import Refusal

_DEFAULTS = {
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "vocab_size": 32064,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_NO_BIAS = Refusal("Phi-3 has no biases")
_LONGROPE_KEY = Refusal("it is a part of longrope, which is not supported", unless=(1, 1.0))


def _tensor_maps(config: ModelConfig) -> list[TensorMap]:
    block = "model.layers.{}."
    maps = [
        table("embed/tokens", "model.embed_tokens.weight"),
        *norm_maps("final_norm", "model.norm", bias=False),
        *norm_maps("blocks/norm1", block + "input_layernorm", bias=False),
        *norm_maps("blocks/norm2", block + "post_attention_layernorm", bias=False),
        stacked_qkv("blocks/attn/qkv/kernel", block + "self_attn.qkv_proj.weight"),
        linear("blocks/attn/out/kernel", block + "self_attn.o_proj.weight", inputs=2),
        # [D, 2, F] flattened is gate, then up
        linear("blocks/mlp/gate_up/kernel", block + "mlp.gate_up_proj.weight"),
        linear("blocks/mlp/down/kernel", block + "mlp.down_proj.weight"),
    ]
    return maps + head_maps(config, "lm_head.weight")


def _read_config(raw: RawConfig) -> dict[str, Any]:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    # early files call longrope "su" or "yarn"
    if scaling not in ("default", None):
        raise UserError(
            f"config.json: RoPE scaling {scaling!r} of Phi-3 (longrope) is not supported; "
            "known: default, as in the 4k models"
        )
    return {
        **read_sizes(raw),
        **read_rope(raw),
        "kv_heads": raw["num_key_value_heads"] or 0,
        "head_dim": raw["head_dim"] or 0,
        "norm": "rmsnorm",
        "norm_eps": raw["rms_norm_eps"],
        "mlp": choose(raw, "hidden_act", GATED_ACTIVATIONS),
        "bias": "none",
        "sliding_window": raw["sliding_window"] or 0,
        "family": "phi3",  # others hold the same model, with other tensors
    }


def _write_config(config: ModelConfig) -> dict[str, Any]:
    is_square = config.head_width * config.heads == config.width
    return {
        **write_sizes(config),
        **({} if is_square else {"head_dim": config.head_width}),
        "num_key_value_heads": config.kv,
        "partial_rotary_factor": config.rotary_fraction,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": first_name(GATED_ACTIVATIONS, config.mlp),
        "sliding_window": config.sliding_window or None,
        # else transformers takes those of Phi-3's own vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _matches(config: ModelConfig) -> bool:
    return (
        has_llama_shape(config)
        and config.bias == "none"
        and config.rope_scaling == "none"
        and not config.qk_norm
    )


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    defaults=_DEFAULTS,
    keys=config_table(
        "phi3",
        {*_DEFAULTS, *ROPE_KEYS},
        refused={
            "attention_bias": _NO_BIAS,
            "mlp_bias": _NO_BIAS,
            "full_attn_mod": Refusal("all layers are alike here", unless=(1,)),
            "interpolate_factor": _LONGROPE_KEY,
        },
    ),
    read_config=_read_config,
    write_config=_write_config,
    tensor_maps=_tensor_maps,
    matches=_matches,
    gguf=GgufNames(
        "phi3",
        {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        sliding_window=True,
    ),
)
