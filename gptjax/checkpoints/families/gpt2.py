"""GPT-2 (`model_type` gpt2): learned positions, LayerNorm, biases everywhere, kernels [in, out]."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import GELUS, Family, GgufNames, choose, has_gpt2_shape
from gptjax.checkpoints.tensor_map import (
    RawConfig,
    TensorMap,
    gpt2_qkv,
    head_maps,
    linear,
    norm_maps,
    same,
    table,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig

# Settings that change what a GPT-2 computes: the only value that is supported.
_REQUIRED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def _tensor_maps(config: ModelConfig) -> list[TensorMap]:
    block = "transformer.h.{}."
    maps = [
        table("embed/tokens", "transformer.wte.weight"),
        same("embed/positions", "transformer.wpe.weight"),
        *norm_maps("final_norm", "transformer.ln_f", bias=True),
        *norm_maps("blocks/norm1", block + "ln_1", bias=True),
        *norm_maps("blocks/norm2", block + "ln_2", bias=True),
        gpt2_qkv("blocks/attn/qkv/kernel", block + "attn.c_attn.weight"),
        gpt2_qkv("blocks/attn/qkv/bias", block + "attn.c_attn.bias"),
    ]
    for layer, module, inputs in (
        ("blocks/attn/out", "attn.c_proj", 2),
        ("blocks/mlp/up", "mlp.c_fc", 1),
        ("blocks/mlp/down", "mlp.c_proj", 1),
    ):
        weight, bias = f"{block}{module}.weight", f"{block}{module}.bias"
        maps.append(linear(f"{layer}/kernel", weight, inputs=inputs, transposed=False))
        maps.append(same(f"{layer}/bias", bias))
    return maps + head_maps(config, "lm_head.weight")


def _read_config(raw: RawConfig) -> dict[str, Any]:
    for key, value in _REQUIRED.items():
        if raw.get(key, value) != value:
            raise UserError(
                f"config.json: {key} = {raw[key]!r} is not supported; GPT-2 has {value}"
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


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_dim or None,
        "n_positions": config.context,
        "n_ctx": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.mlp == "gelu" else "gelu",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _matches(config: ModelConfig) -> bool:
    return has_gpt2_shape(config) and config.positions == "learned" and not config.parallel


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    read_config=_read_config,
    write_config=_write_config,
    tensor_maps=_tensor_maps,
    matches=_matches,
    kernels_in_out=True,
    gguf=GgufNames(
        "gpt2",
        {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
            "ln_1": "attn_norm",
            "ln_2": "ffn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
    ),
)
