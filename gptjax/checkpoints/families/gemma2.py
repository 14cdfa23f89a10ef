"""Gemma 2 (`model_type` gemma2): norms before and after each part, soft caps, alternate windows.

Norms multiply by 1 + scale; the scale is kept as the file has it, so that it comes back bit for
bit. There is no export to GGUF, whose files hold 1 + scale.
"""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import (
    GATED_ACTIVATIONS,
    Family,
    choose,
    first_name,
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
    same,
    split_gate_up,
    split_qkv,
    table,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.foreign_keys import Refusal

_DEFAULTS = {
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "vocab_size": 256000,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def _tensor_maps(config: ModelConfig) -> list[TensorMap]:
    block = "model.layers.{}."
    q, k, v = (f"{block}self_attn.{name}_proj" for name in "qkv")
    gate, up = block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"
    maps = [
        table("embed/tokens", "model.embed_tokens.weight"),
        *norm_maps("final_norm", "model.norm", bias=False),
        *norm_maps("blocks/norm1", block + "input_layernorm", bias=False),
        *norm_maps("blocks/post_norm1", block + "post_attention_layernorm", bias=False),
        *norm_maps("blocks/norm2", block + "pre_feedforward_layernorm", bias=False),
        *norm_maps("blocks/post_norm2", block + "post_feedforward_layernorm", bias=False),
        split_qkv("blocks/attn/qkv/kernel", f"{q}.weight", f"{k}.weight", f"{v}.weight"),
        linear("blocks/attn/out/kernel", block + "self_attn.o_proj.weight", inputs=2),
        split_gate_up("blocks/mlp/gate_up/kernel", gate, up),
        linear("blocks/mlp/down/kernel", block + "mlp.down_proj.weight"),
    ]
    if config.bias == "attention":
        maps.append(split_qkv("blocks/attn/qkv/bias", f"{q}.bias", f"{k}.bias", f"{v}.bias"))
        maps.append(same("blocks/attn/out/bias", block + "self_attn.o_proj.bias"))
    return maps + head_maps(config, "lm_head.weight")


def _read_config(raw: RawConfig) -> dict[str, Any]:
    head_dim, scalar = raw["head_dim"], raw["query_pre_attn_scalar"]
    return {
        **read_sizes(raw),
        **read_rope(raw),
        **_read_windows(raw),
        "kv_heads": raw["num_key_value_heads"] or 0,
        "head_dim": head_dim,
        "norm": "rmsnorm",
        "norm_eps": raw["rms_norm_eps"],
        "norm_plus_one": True,
        "post_norms": True,
        "mlp": choose(raw, "hidden_activation", GATED_ACTIVATIONS),
        "bias": "attention" if raw["attention_bias"] else "none",
        "scale_embeddings": True,
        "query_pre_attn_scalar": 0 if scalar == head_dim else scalar,
        "attention_softcap": float(raw["attn_logit_softcapping"] or 0.0),
        "logit_softcap": float(raw["final_logit_softcapping"] or 0.0),
    }


def _alternating(layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]


def _read_windows(raw: RawConfig) -> dict[str, Any]:
    """Every second layer has the window, unless `layer_types` says that all have it, or none."""
    window = raw["sliding_window"] or 0
    alternating = _alternating(raw["num_hidden_layers"])
    layer_types = raw["layer_types"] or alternating
    if layer_types == alternating and window:
        return {"sliding_window": window, "alternate_windows": True}
    if not window or set(layer_types) == {"full_attention"}:
        return {"sliding_window": 0}
    if set(layer_types) == {"sliding_attention"}:
        return {"sliding_window": window}
    raise UserError(
        "config.json: layer_types of Gemma 2 are supported where sliding_attention and "
        "full_attention alternate, or all are the same"
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    layer_types = _alternating(config.layers)
    if not config.alternate_windows:
        kind = "sliding_attention" if config.sliding_window else "full_attention"
        layer_types = [kind] * config.layers
    return {
        **write_sizes(config),
        "num_key_value_heads": config.kv,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": first_name(GATED_ACTIVATIONS, config.mlp),
        "attention_bias": config.bias == "attention",
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_width,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
        # transformers wants a number even where no layer has the window
        "sliding_window": config.sliding_window or config.context,
        "layer_types": layer_types,
        # else transformers takes those of Gemma's own vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _matches(config: ModelConfig) -> bool:
    return (
        config.positions == "rope"
        and config.rotary_fraction == 1.0
        and config.norm == "rmsnorm"
        and config.norm_plus_one
        and config.post_norms
        and config.mlp in GATED_ACTIVATIONS.values()
        and config.bias in ("none", "attention")
        and config.scale_embeddings
        and not config.qk_norm
        and not config.parallel
        and not config.scale_scores_by_layer
    )


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    defaults=_DEFAULTS,
    keys=config_table(
        "gemma2",
        {*_DEFAULTS, *ROPE_KEYS},
        no_effect={
            "hidden_act": "hidden_activation says it",
            "sliding_window_size": "sliding_window says it",
        },
        refused={
            "partial_rotary_factor": Refusal("Gemma 2 turns all of a head", unless=(1, 1.0)),
            "sliding_window_pattern": Refusal("layer_types says it", unless=(2,)),
            "_sliding_window_pattern": Refusal("layer_types says it", unless=(2,)),
        },
    ),
    read_config=_read_config,
    write_config=_write_config,
    tensor_maps=_tensor_maps,
    matches=_matches,
)
