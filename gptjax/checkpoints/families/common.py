"""TODO docstring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gptjax.checkpoints.tensor_map import Raw, TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig


def choose(raw: Raw, key: str, options: dict[Any, str], default: Any = None) -> str:
    value = raw.get(key, default)
    if value not in options:
        raise UserError(
            f"config.json: {key} = {value!r} is not supported; known: {', '.join(map(str, options))}"
        )
    return options[value]


GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}


def read_rope(raw: Raw, context: int, default_share: float = 1.0) -> dict[str, Any]:
    """Both spellings: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4, and GPT-NeoX's own names)."""
    rope = {
        "rope_theta": raw.get("rope_theta") or raw.get("rotary_emb_base"),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = (
        rope.get("partial_rotary_factor")
        or raw.get("partial_rotary_factor")
        or raw.get("rotary_pct")
        or default_share
    )
    found: dict[str, Any] = {
        "positions": "rope",
        "rope_theta": float(rope["rope_theta"] or 10_000.0),
        "rotary_fraction": float(share),
    }
    if kind in (
        "default",
        "dynamic",
        None,
    ):  # dynamic scaling changes nothing up to the context, where we stop
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"config.json: RoPE scaling {kind!r} is not supported; known: default, dynamic, linear, llama3, yarn"
        )
    found |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind != "linear":
        found["rope_original_context"] = rope.get("original_max_position_embeddings") or context
    if kind == "llama3":
        found |= {
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
        }
    if kind == "yarn":
        if not rope.get("truncate", True) or rope.get("mscale"):
            raise UserError("config.json: yarn with truncate = false or mscale is not supported")
        found |= {
            "rope_beta_fast": float(rope.get("beta_fast") or 32),
            "rope_beta_slow": float(rope.get("beta_slow") or 1),
        }
        found["rope_attention_factor"] = float(rope.get("attention_factor") or 0.0)
    return found


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """transformers 4's spelling, which 5 reads too."""
    if c.rope_scaling == "none":
        return {"rope_theta": c.rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = c.rope_original_context
    if c.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
        }
    if c.rope_scaling == "yarn":
        scaling |= {"beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow}
        scaling |= {"attention_factor": c.rope_attention_factor} if c.rope_attention_factor else {}
    return {"rope_theta": c.rope_theta, "rope_scaling": scaling}


def read_common(raw: Raw) -> dict[str, Any]:
    return {
        "layers": raw["num_hidden_layers"],
        "width": raw["hidden_size"],
        "heads": raw["num_attention_heads"],
        "mlp_dim": raw["intermediate_size"],
        "context": raw["max_position_embeddings"],
        "vocab_size": raw["vocab_size"],
        "init_std": raw.get("initializer_range", 0.02),
    }


def write_common(c: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        **write_rope(c),
    }


@dataclasses.dataclass(frozen=True)
class Family:
    architecture: str
    prefix: str  # absent from the tensors of files that hold the bare decoder
    read: Callable[[Raw], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: Callable[[ModelConfig], list[TensorMap]]
