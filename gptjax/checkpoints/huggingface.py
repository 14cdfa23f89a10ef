"""Hugging Face checkpoints: one table of names and transforms for each family, read in both directions.

A family says how its `config.json` reads as a `ModelConfig` and is written from one, and which of their tensors make which of our
parameters (`gptjax.transfer` applies them). To add a family, add a function of rows and an entry in `FAMILIES`. Both spellings of configs are read (transformers 4 and 5).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax import config as config_lib
from gptjax import settings
from gptjax.config import ModelConfig, UserError

Raw = Mapping[str, Any]
Load = Callable[..., np.ndarray]  # (config, our shape, *their arrays) -> our array (of one layer)
Dump = Callable[[ModelConfig, Any], tuple[Any, ...]]  # (config, our array of one layer) -> their arrays


@dataclasses.dataclass(frozen=True)
class Row:
    """`ours` (a path; below blocks/ it stands for every layer) is made of the tensors `theirs` (`{}` is the layer's number)."""

    ours: str
    theirs: tuple[str, ...]
    load: Load
    dump: Dump


def same(ours: str, theirs: str) -> Row:
    return Row(ours, (theirs,), lambda c, shape, a: a.reshape(shape), lambda c, x: (x.reshape(-1) if ours.endswith("bias") else x,))


def table(ours: str, theirs: str) -> Row:
    """An embedding: our padding of the vocabulary comes and goes."""
    return Row(ours, (theirs,), lambda c, shape, a: a, lambda c, x: (x[: c.vocab_size],))


def linear(ours: str, theirs: str, *, inputs: int = 1, transposed: bool = True) -> Row:
    """A kernel with `inputs` leading input axes; theirs is [out, in], or [in, out] where not `transposed` (GPT-2's Conv1D)."""

    def dump(c: ModelConfig, x: Any) -> tuple[Any, ...]:
        flat = x.reshape(math.prod(x.shape[:inputs]), -1)
        return (flat.T if transposed else flat,)

    return Row(ours, (theirs,), lambda c, shape, a: (a.T if transposed else a).reshape(shape), dump)


def _split_qkv(ours: str, *theirs: str) -> Row:
    """q [H C, D], k and v [K C, D] (or biases) as our [D, K, G + 2, C]: each key/value head beside its own queries."""

    def load(c: ModelConfig, shape: tuple[int, ...], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        rest = q.shape[1:]
        heads = np.concatenate([a.reshape(c.kv, -1, c.head_width, *rest) for a in (q, k, v)], axis=1)
        return heads.transpose(3, 0, 1, 2) if rest else heads

    def dump(c: ModelConfig, x: Any) -> tuple[Any, ...]:
        heads = x.transpose(1, 2, 3, 0) if x.ndim == 4 else x
        groups, rest = c.heads // c.kv, heads.shape[3:]
        return tuple(part.reshape(-1, *rest) for part in (heads[:, :groups], heads[:, groups : groups + 1], heads[:, groups + 1 :]))

    return Row(ours, theirs, load, dump)


def _fused_qkv(ours: str, theirs: str, *, conv: bool) -> Row:
    """q, k, v in one tensor: [D, 3, H, C] in GPT-2 (`conv`), [H, 3, C, D] in GPT-NeoX."""

    def load(c: ModelConfig, shape: tuple[int, ...], a: np.ndarray) -> np.ndarray:
        if conv:
            return a.reshape(*a.shape[:-1], 3, c.heads, c.head_width).swapaxes(-2, -3)
        split = a.reshape(c.heads, 3, c.head_width, *a.shape[1:])
        return split.transpose(3, 0, 1, 2) if split.ndim == 4 else split

    def dump(c: ModelConfig, x: Any) -> tuple[Any, ...]:
        if conv:
            return (x.swapaxes(-2, -3).reshape(*x.shape[:-3], -1),)
        return ((x.transpose(1, 2, 3, 0).reshape(-1, x.shape[0]) if x.ndim == 4 else x.reshape(-1)),)

    return Row(ours, (theirs,), load, dump)


def _gate_up(ours: str, gate: str, up: str) -> Row:
    load = lambda c, shape, a, b: np.stack([a.T, b.T], axis=-2)
    return Row(ours, (gate, up), load, lambda c, x: (x[..., 0, :].T, x[..., 1, :].T))


def _norms(ours: str, theirs: str, bias: bool) -> list[Row]:
    return [same(f"{ours}/scale", f"{theirs}.weight")] + ([same(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def _head(c: ModelConfig, theirs: str) -> list[Row]:
    """The head on tokens that tells classes apart, or the one of an untied language model."""
    if c.labels:
        return [same("score/kernel", "score.weight")]
    return [] if c.tied else [table("head/kernel", theirs)]


def gpt2_rows(c: ModelConfig) -> list[Row]:
    rows, h = [table("embed/tokens", "transformer.wte.weight"), same("embed/positions", "transformer.wpe.weight")], "transformer.h.{}."
    rows += _norms("final_norm", "transformer.ln_f", True)
    rows += _norms("blocks/norm1", h + "ln_1", True) + _norms("blocks/norm2", h + "ln_2", True)
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        rows.append(_fused_qkv(f"blocks/attn/qkv/{kind}", f"{h}attn.c_attn.{name}", conv=True))
    for ours, theirs, inputs in (("attn/out", "attn.c_proj", 2), ("mlp/up", "mlp.c_fc", 1), ("mlp/down", "mlp.c_proj", 1)):
        rows.append(linear(f"blocks/{ours}/kernel", f"{h}{theirs}.weight", inputs=inputs, transposed=False))
        rows.append(same(f"blocks/{ours}/bias", f"{h}{theirs}.bias"))
    return rows + _head(c, "lm_head.weight")


def neox_rows(c: ModelConfig) -> list[Row]:
    rows, h = [table("embed/tokens", "gpt_neox.embed_in.weight")], "gpt_neox.layers.{}."
    rows += _norms("final_norm", "gpt_neox.final_layer_norm", True)
    rows += _norms("blocks/norm1", h + "input_layernorm", True) + _norms("blocks/norm2", h + "post_attention_layernorm", True)
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        rows.append(_fused_qkv(f"blocks/attn/qkv/{kind}", f"{h}attention.query_key_value.{name}", conv=False))
    for ours, theirs, inputs in (("attn/out", "attention.dense", 2), ("mlp/up", "mlp.dense_h_to_4h", 1), ("mlp/down", "mlp.dense_4h_to_h", 1)):
        rows.append(linear(f"blocks/{ours}/kernel", f"{h}{theirs}.weight", inputs=inputs))
        rows.append(same(f"blocks/{ours}/bias", f"{h}{theirs}.bias"))
    return rows + _head(c, "embed_out.weight")


def llama_rows(c: ModelConfig) -> list[Row]:
    """Llama, Mistral, Qwen2, Qwen3 and SmolLM2: they differ in biases and in the norms of queries and keys."""
    rows, h = [table("embed/tokens", "model.embed_tokens.weight")], "model.layers.{}."
    rows += _norms("final_norm", "model.norm", False)
    rows += _norms("blocks/norm1", h + "input_layernorm", False) + _norms("blocks/norm2", h + "post_attention_layernorm", False)
    qkv = [f"{h}self_attn.{name}_proj" for name in "qkv"]
    rows.append(_split_qkv("blocks/attn/qkv/kernel", *(f"{name}.weight" for name in qkv)))
    if c.bias != "none":
        rows.append(_split_qkv("blocks/attn/qkv/bias", *(f"{name}.bias" for name in qkv)))
    if c.qk_norm:
        rows += [same(f"blocks/attn/{x}_norm/scale", f"{h}self_attn.{x}_norm.weight") for x in "qk"]
    rows.append(linear("blocks/attn/out/kernel", f"{h}self_attn.o_proj.weight", inputs=2))
    if c.bias == "attention":
        rows.append(same("blocks/attn/out/bias", f"{h}self_attn.o_proj.bias"))
    rows.append(_gate_up("blocks/mlp/gate_up/kernel", f"{h}mlp.gate_proj.weight", f"{h}mlp.up_proj.weight"))
    rows.append(linear("blocks/mlp/down/kernel", f"{h}mlp.down_proj.weight"))
    return rows + _head(c, "lm_head.weight")


def _choose(raw: Raw, key: str, options: dict[Any, str], default: Any = None) -> str:
    value = raw.get(key, default)
    if value not in options:
        raise UserError(f"config.json: {key} = {value!r} is not supported; known: {', '.join(map(str, options))}")
    return options[value]


_GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}


def _read_gpt2(raw: Raw) -> dict[str, Any]:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        if raw.get(key, usual) != usual:
            raise UserError(f"config.json: {key} = {raw[key]!r} is not supported; GPT-2 has {usual}")
    return {
        "layers": raw["n_layer"], "width": raw["n_embd"], "heads": raw["n_head"], "hidden": raw.get("n_inner") or 0,
        "context": raw.get("n_positions") or raw["n_ctx"], "vocab_size": raw["vocab_size"], "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "mlp": _choose(raw, "activation_function", _GELUS, "gelu_new"), "tied": raw.get("tie_word_embeddings", True),
        "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": c.layers, "n_embd": c.width, "n_head": c.heads, "n_inner": c.hidden or None, "n_positions": c.context, "n_ctx": c.context,
        "layer_norm_epsilon": c.norm_eps, "activation_function": "gelu_new" if c.mlp == "gelu" else "gelu",
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
    }  # fmt: skip


def _read_rope(raw: Raw, context: int, default_share: float = 1.0) -> dict[str, Any]:
    """Both spellings: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4, and GPT-NeoX's own names)."""
    rope = {
        "rope_theta": raw.get("rope_theta") or raw.get("rotary_emb_base"),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or raw.get("rotary_pct") or default_share
    found: dict[str, Any] = {"positions": "rope", "rope_base": float(rope["rope_theta"] or 10_000.0), "rope_share": float(share)}
    if kind in ("default", "dynamic", None):  # dynamic scaling changes nothing up to the context, where we stop
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"config.json: RoPE scaling {kind!r} is not supported; known: default, dynamic, linear, llama3, yarn")
    found |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind != "linear":
        found["rope_original_context"] = rope.get("original_max_position_embeddings") or context
    if kind == "llama3":
        found |= {"rope_low_freq": float(rope["low_freq_factor"]), "rope_high_freq": float(rope["high_freq_factor"])}
    if kind == "yarn":
        if not rope.get("truncate", True) or rope.get("mscale"):
            raise UserError("config.json: yarn with truncate = false or mscale is not supported")
        found |= {"rope_beta_fast": float(rope.get("beta_fast") or 32), "rope_beta_slow": float(rope.get("beta_slow") or 1)}
        found["rope_attention_factor"] = float(rope.get("attention_factor") or 0.0)
    return found


def _write_rope(c: ModelConfig) -> dict[str, Any]:
    """transformers 4's spelling, which 5 reads too."""
    if c.rope_scaling == "none":
        return {"rope_theta": c.rope_base, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = c.rope_original_context
    if c.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": c.rope_low_freq, "high_freq_factor": c.rope_high_freq}
    if c.rope_scaling == "yarn":
        scaling |= {"beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow}
        scaling |= {"attention_factor": c.rope_attention_factor} if c.rope_attention_factor else {}
    return {"rope_theta": c.rope_base, "rope_scaling": scaling}


def _read_common(raw: Raw) -> dict[str, Any]:
    return {
        "layers": raw["num_hidden_layers"], "width": raw["hidden_size"], "heads": raw["num_attention_heads"], "hidden": raw["intermediate_size"],
        "context": raw["max_position_embeddings"], "vocab_size": raw["vocab_size"], "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def _write_common(c: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": c.layers, "hidden_size": c.width, "num_attention_heads": c.heads, "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context, **_write_rope(c),
    }  # fmt: skip


def _read_neox(raw: Raw) -> dict[str, Any]:
    if not raw.get("attention_bias", True):
        raise UserError("config.json: attention_bias = false is not supported in GPT-NeoX")
    return {
        **_read_common(raw), **_read_rope(raw, raw["max_position_embeddings"], 0.25), "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "parallel": raw.get("use_parallel_residual", True), "mlp": _choose(raw, "hidden_act", _GELUS, "gelu"),
        "tied": raw.get("tie_word_embeddings", False),
    }  # fmt: skip


def _write_neox(c: ModelConfig) -> dict[str, Any]:
    return {
        **_write_common(c), "rotary_pct": c.rope_share, "rotary_emb_base": c.rope_base, "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel, "hidden_act": "gelu_new" if c.mlp == "gelu" else "gelu", "attention_bias": True,
    }  # fmt: skip


def _read_llama(raw: Raw) -> dict[str, Any]:
    kind = raw["model_type"]
    _choose(raw, "hidden_act", {"silu": "swiglu"}, "silu")
    if raw.get("mlp_bias"):
        raise UserError("config.json: mlp_bias = true is not supported in this family")
    biased = raw.get("attention_bias", False)
    window = raw.get("sliding_window") or 0
    if kind in ("qwen2", "qwen3"):
        first = raw.get("max_window_layers", 28)
        kinds = raw.get("layer_types") or [
            name for name, there in (("full_attention", first > 0), ("sliding_attention", first < raw["num_hidden_layers"])) if there
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
        **_read_common(raw), **_read_rope(raw, context), "kv_heads": raw.get("num_key_value_heads") or 0,
        "head_dim": raw.get("head_dim") or (128 if kind == "qwen3" else 0), "norm": "rmsnorm", "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp": "swiglu", "bias": "qkv" if kind == "qwen2" else "attention" if biased else "none", "qk_norm": kind == "qwen3",
        "window": window, "tied": raw.get("tie_word_embeddings", False),
    }  # fmt: skip


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    kind = family_of(c)
    found = {
        **_write_common(c), "num_key_value_heads": c.kv, "head_dim": c.head_width, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
        "attention_bias": c.bias == "attention",
    }  # fmt: skip
    if kind == "mistral":
        found["sliding_window"] = c.window
    if kind in ("qwen2", "qwen3"):
        found |= {"sliding_window": c.window or None, "use_sliding_window": bool(c.window), "max_window_layers": 0 if c.window else c.layers}
    return found


@dataclasses.dataclass(frozen=True)
class Family:
    architecture: str
    prefix: str  # absent from the tensors of files that hold the bare decoder
    read: Callable[[Raw], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: Callable[[ModelConfig], list[Row]]


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", _read_gpt2, _write_gpt2, gpt2_rows),
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", _read_neox, _write_neox, neox_rows),
    "llama": Family("LlamaForCausalLM", "model.", _read_llama, _write_llama, llama_rows),
    "mistral": Family("MistralForCausalLM", "model.", _read_llama, _write_llama, llama_rows),
    "qwen2": Family("Qwen2ForCausalLM", "model.", _read_llama, _write_llama, llama_rows),
    "qwen3": Family("Qwen3ForCausalLM", "model.", _read_llama, _write_llama, llama_rows),
}
# Buffers that old files carry: masks of GPT-2 and NeoX, RoPE's frequencies.
BUFFERS = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


def family_of(c: ModelConfig) -> str:
    """The family that holds a model of this config. Raises UserError where none does."""
    plain = not c.logit_softcap and c.rope_share == 1.0 and not c.parallel
    square = c.kv == c.heads and c.head_width * c.heads == c.width and not c.window and not c.qk_norm and not c.logit_softcap
    if c.norm == "layernorm" and c.mlp != "swiglu" and c.bias == "all" and square:
        if c.positions == "learned" and not c.parallel:
            return "gpt2"
        if c.positions == "rope":
            return "gpt_neox"
    if c.positions == "rope" and c.norm == "rmsnorm" and c.mlp == "swiglu" and plain:
        if c.qk_norm and c.bias in ("none", "attention"):
            return "qwen3"
        if c.bias == "qkv" and not c.qk_norm and c.head_width * c.heads == c.width:
            return "qwen2"
        if c.bias in ("none", "attention") and not c.qk_norm:
            if not c.window:
                return "llama"
            if c.bias == "none":
                return "mistral"
    raise UserError(
        f"no Hugging Face architecture holds this model (positions {c.positions}, norm {c.norm}, mlp {c.mlp}, bias {c.bias}, window {c.window}, "
        f"softcap {c.logit_softcap});\nknown: {', '.join(FAMILIES)}. Keep it as a workdir: --format=gptjax"
    )


def read_config(raw: Raw) -> ModelConfig:
    """`config.json` as a ModelConfig. Raises UserError for an unknown architecture, a missing key or a value that makes no sense."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"config.json: {config_lib.unknown_name('architecture', str(kind), list(FAMILIES))}")
    try:
        return settings.build({"model": {**FAMILIES[kind].read(raw), "labels": _labels(raw)}}).model
    except KeyError as error:
        raise UserError(f"config.json has no {error}, which a {kind} model needs") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise UserError(f"config.json: {error}") from None
        raise UserError(f"config.json holds a value of a wrong type: {error}") from None


def _labels(raw: Raw) -> list[str]:
    """Names of the classes of a `...ForSequenceClassification`; none of a language model."""
    if not any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or []):
        return []
    names = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}
    return [str(names[key]) for key in sorted(names, key=int)]


def write_config(c: ModelConfig, dtype: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a model. extra: ids of special tokens and other keys to keep."""
    kind = family_of(c)
    family = FAMILIES[kind]
    architecture = family.architecture
    if c.labels:
        architecture = re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", architecture)
        names = {"id2label": dict(enumerate(c.labels)), "label2id": {name: i for i, name in enumerate(c.labels)}}
        kind_of = "regression" if len(c.labels) == 1 else "single_label_classification"
        eos = extra.get("eos_token_id")  # theirs finds each row's last token by what is no padding, so there must be some
        extra = {"pad_token_id": eos[0] if isinstance(eos, list) else eos, **extra, **names, "problem_type": kind_of}
    return {
        "architectures": [architecture], "model_type": kind, **family.write(c), "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied, "initializer_range": c.init_std, "torch_dtype": dtype, **extra,
    }  # fmt: skip
