"""GPT-2 (`model_type` gpt2): learned positions, LayerNorm, biases everywhere, kernels [in, out]."""

from __future__ import annotations

from typing import Any

from gptjax.checkpoints.families.common import (
    ACTIVATIONS,
    Family,
    GgufNames,
    choose,
    first_name,
    has_gpt2_shape,
)
from gptjax.checkpoints.families.config_keys import config_table
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
from gptjax.config.schema import ModelConfig

_DEFAULTS = {
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}

# The common names of the sizes, which transformers reads in place of GPT-2's own.
_COMMON_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
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
    sizes = {key: raw.get(name) or raw[key] for key, name in _COMMON_NAMES.items()}
    return {
        "layers": sizes["n_layer"],
        "width": sizes["n_embd"],
        "heads": sizes["n_head"],
        "mlp_dim": raw["n_inner"] or 0,
        "context": sizes["n_positions"],
        "norm_eps": raw["layer_norm_epsilon"],
        "mlp": choose(raw, "activation_function", ACTIVATIONS),
        "query_pre_attn_scalar": 0 if raw["scale_attn_weights"] else 1,
        "scale_scores_by_layer": raw["scale_attn_by_inverse_layer_idx"],
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
        "activation_function": first_name(ACTIVATIONS, config.mlp),
        "scale_attn_weights": not config.query_pre_attn_scalar,
        "scale_attn_by_inverse_layer_idx": config.scale_scores_by_layer,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _matches(config: ModelConfig) -> bool:
    return (
        has_gpt2_shape(config)
        and config.positions == "learned"
        and config.bias == "all"
        and config.query_pre_attn_scalar in (0, 1)
        and not config.parallel
    )


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    defaults=_DEFAULTS,
    keys=config_table(
        "gpt2",
        {*_DEFAULTS, *_COMMON_NAMES.values()},
        no_effect={
            "n_ctx": "n_positions says it",
            "n_special": "belongs to the tokenizer",
            "predict_special_tokens": "belongs to the tokenizer",
            "afn": "activation_function says it",
        },
    ),
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
