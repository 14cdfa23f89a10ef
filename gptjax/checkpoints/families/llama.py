"""TODO docstring."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import choose, read_common, read_rope, write_common
from gptjax.checkpoints.tensor_map import (
    Raw,
    TensorMap,
    gate_up_maps,
    head_maps,
    linear,
    norm_maps,
    same,
    split_qkv,
    table,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig


def llama_maps(c: ModelConfig) -> list[TensorMap]:
    """Llama, Mistral, Qwen2, Qwen3 and SmolLM2: they differ in biases and in the norms of queries and keys."""
    rows, h = [table("embed/tokens", "model.embed_tokens.weight")], "model.layers.{}."
    rows += norm_maps("final_norm", "model.norm", False)
    rows += norm_maps("blocks/norm1", h + "input_layernorm", False) + norm_maps(
        "blocks/norm2", h + "post_attention_layernorm", False
    )
    qkv = [f"{h}self_attn.{name}_proj" for name in "qkv"]
    rows.append(split_qkv("blocks/attn/qkv/kernel", *(f"{name}.weight" for name in qkv)))
    if c.bias != "none":
        rows.append(split_qkv("blocks/attn/qkv/bias", *(f"{name}.bias" for name in qkv)))
    if c.qk_norm:
        rows += [same(f"blocks/attn/{x}_norm/scale", f"{h}self_attn.{x}_norm.weight") for x in "qk"]
    rows.append(linear("blocks/attn/out/kernel", f"{h}self_attn.o_proj.weight", inputs=2))
    if c.bias == "attention":
        rows.append(same("blocks/attn/out/bias", f"{h}self_attn.o_proj.bias"))
    rows.append(
        gate_up_maps(
            "blocks/mlp/gate_up/kernel", f"{h}mlp.gate_proj.weight", f"{h}mlp.up_proj.weight"
        )
    )
    rows.append(linear("blocks/mlp/down/kernel", f"{h}mlp.down_proj.weight"))
    return rows + head_maps(c, "lm_head.weight")


def read_llama(raw: Raw) -> dict[str, Any]:
    kind = raw["model_type"]
    choose(raw, "hidden_act", {"silu": "swiglu"}, "silu")
    if raw.get("mlp_bias"):
        raise UserError("config.json: mlp_bias = true is not supported in this family")
    biased = raw.get("attention_bias", False)
    window = raw.get("sliding_window") or 0
    if kind in ("qwen2", "qwen3"):
        first = raw.get("max_window_layers", 28)
        kinds = raw.get("layer_types") or [
            name
            for name, there in (
                ("full_attention", first > 0),
                ("sliding_attention", first < raw["num_hidden_layers"]),
            )
            if there
        ]
        window = window if raw.get("use_sliding_window") and "sliding_attention" in kinds else 0
        if window and "full_attention" in kinds:
            raise UserError(
                "config.json: layers with and without a sliding window in one model are not supported; set use_sliding_window to false if texts are short"
            )
    elif kind == "llama":
        window = 0
    context = raw["max_position_embeddings"]
    return {
        **read_common(raw),
        **read_rope(raw, context),
        "kv_heads": raw.get("num_key_value_heads") or 0,
        "head_dim": raw.get("head_dim") or (128 if kind == "qwen3" else 0),
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "bias": "qkv" if kind == "qwen2" else "attention" if biased else "none",
        "qk_norm": kind == "qwen3",
        "sliding_window": window,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def write_llama(c: ModelConfig, kind: str) -> dict[str, Any]:
    found = {
        **write_common(c),
        "num_key_value_heads": c.kv,
        "head_dim": c.head_width,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "attention_bias": c.bias == "attention",
    }
    if kind == "mistral":
        found["sliding_window"] = c.sliding_window
    if kind in ("qwen2", "qwen3"):
        found |= {
            "sliding_window": c.sliding_window or None,
            "use_sliding_window": bool(c.sliding_window),
            "max_window_layers": 0 if c.sliding_window else c.layers,
        }
    return found
