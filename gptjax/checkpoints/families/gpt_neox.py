"""TODO docstring."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import GELUS, choose, read_common, read_rope, write_common
from gptjax.checkpoints.tensor_map import (
    Raw,
    TensorMap,
    fused_qkv,
    head_maps,
    linear,
    norm_maps,
    same,
    table,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig


def neox_maps(c: ModelConfig) -> list[TensorMap]:
    rows, h = [table("embed/tokens", "gpt_neox.embed_in.weight")], "gpt_neox.layers.{}."
    rows += norm_maps("final_norm", "gpt_neox.final_layer_norm", True)
    rows += norm_maps("blocks/norm1", h + "input_layernorm", True) + norm_maps(
        "blocks/norm2", h + "post_attention_layernorm", True
    )
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        rows.append(
            fused_qkv(f"blocks/attn/qkv/{kind}", f"{h}attention.query_key_value.{name}", conv=False)
        )
    for ours, theirs, inputs in (
        ("attn/out", "attention.dense", 2),
        ("mlp/up", "mlp.dense_h_to_4h", 1),
        ("mlp/down", "mlp.dense_4h_to_h", 1),
    ):
        rows.append(linear(f"blocks/{ours}/kernel", f"{h}{theirs}.weight", inputs=inputs))
        rows.append(same(f"blocks/{ours}/bias", f"{h}{theirs}.bias"))
    return rows + head_maps(c, "embed_out.weight")


def read_neox(raw: Raw) -> dict[str, Any]:
    if not raw.get("attention_bias", True):
        raise UserError("config.json: attention_bias = false is not supported in GPT-NeoX")
    return {
        **read_common(raw),
        **read_rope(raw, raw["max_position_embeddings"], 0.25),
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "parallel": raw.get("use_parallel_residual", True),
        "mlp": choose(raw, "hidden_act", GELUS, "gelu"),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def write_neox(c: ModelConfig, kind: str) -> dict[str, Any]:
    return {
        **write_common(c),
        "rotary_pct": c.rotary_fraction,
        "rotary_emb_base": c.rope_theta,
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel,
        "hidden_act": "gelu_new" if c.mlp == "gelu" else "gelu",
        "attention_bias": True,
    }
