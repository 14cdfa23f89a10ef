"""TODO docstring."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import GELUS, choose
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


def gpt2_maps(c: ModelConfig) -> list[TensorMap]:
    rows, h = (
        [
            table("embed/tokens", "transformer.wte.weight"),
            same("embed/positions", "transformer.wpe.weight"),
        ],
        "transformer.h.{}.",
    )
    rows += norm_maps("final_norm", "transformer.ln_f", True)
    rows += norm_maps("blocks/norm1", h + "ln_1", True) + norm_maps(
        "blocks/norm2", h + "ln_2", True
    )
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        rows.append(fused_qkv(f"blocks/attn/qkv/{kind}", f"{h}attn.c_attn.{name}", conv=True))
    for ours, theirs, inputs in (
        ("attn/out", "attn.c_proj", 2),
        ("mlp/up", "mlp.c_fc", 1),
        ("mlp/down", "mlp.c_proj", 1),
    ):
        rows.append(
            linear(f"blocks/{ours}/kernel", f"{h}{theirs}.weight", inputs=inputs, transposed=False)
        )
        rows.append(same(f"blocks/{ours}/bias", f"{h}{theirs}.bias"))
    return rows + head_maps(c, "lm_head.weight")


def read_gpt2(raw: Raw) -> dict[str, Any]:
    for key, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if raw.get(key, usual) != usual:
            raise UserError(
                f"config.json: {key} = {raw[key]!r} is not supported; GPT-2 has {usual}"
            )
    return {
        "layers": raw["n_layer"],
        "width": raw["n_embd"],
        "heads": raw["n_head"],
        "mlp_dim": raw.get("n_inner") or 0,
        "context": raw.get("n_positions") or raw["n_ctx"],
        "vocab_size": raw["vocab_size"],
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "mlp": choose(raw, "activation_function", GELUS, "gelu_new"),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
        "init_std": raw.get("initializer_range", 0.02),
    }


def write_gpt2(c: ModelConfig, kind: str) -> dict[str, Any]:
    return {
        "n_layer": c.layers,
        "n_embd": c.width,
        "n_head": c.heads,
        "n_inner": c.mlp_dim or None,
        "n_positions": c.context,
        "n_ctx": c.context,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new" if c.mlp == "gelu" else "gelu",
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
    }
