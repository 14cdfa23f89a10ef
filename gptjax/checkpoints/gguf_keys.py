"""Every key of a GGUF file: what becomes of it, and the model's settings that it says.

`check_keys` refuses what cannot be honoured. `read_config` gives the settings in the words of
Hugging Face's config.json, `write_settings` the way back. To honour a further key, move it to
`used` in `_settings_table` and read it in `read_config`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints import huggingface
from gptjax.checkpoints.families.common import Family
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import cli
from gptjax.core.foreign_keys import KeyTable, Refusal
from gptjax.model.rope import rope_tables

# {GGUF's architecture: our family}
ARCHITECTURES: dict[str, Family] = {
    family.gguf.architecture: family for family in huggingface.FAMILIES.values() if family.gguf
}

# A file with llama3 scaling holds what each RoPE frequency is divided by.
ROPE_DIVISORS = "rope_freqs.weight"

_ABOUT_FILE = "says where the file comes from"
_OFF = (0, 0.0, False)
_ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask")


def _keys(prefix: str, names: str) -> list[str]:
    return [prefix + name for name in names.split()]


FILE_KEYS = KeyTable(
    "GGUF: keys of the file and its tokenizer",
    used=frozenset(
        _keys("general.", "architecture alignment name")
        + _keys("general.sampling.", "temp top_k top_p min_p penalty_repeat")
        + _keys("split.", "no count tensors.count")
        + _keys("tokenizer.ggml.", "model pre tokens token_type scores merges add_space_prefix")
        + _keys("tokenizer.ggml.add_", "bos_token eos_token")
        + [f"tokenizer.ggml.{role}_token_id" for role in _ROLES]
        + ["tokenizer.chat_template", "tokenizer.chat_template.*"]
    ),
    no_effect={
        "general.*": _ABOUT_FILE,
        "quantize.*": _ABOUT_FILE,
        "imatrix.*": _ABOUT_FILE,
        "mradermacher.*": _ABOUT_FILE,  # a publisher of many files
        "tokenizer.chat_templates": "the names of the templates, which have keys of their own",
        "tokenizer.huggingface.json": "the other fields say the same, and llama.cpp reads those",
        "tokenizer.rwkv.world": "of a tokenizer whose model is refused",
        "tokenizer.ggml.token_type_count": "token types are BERT's",
        "tokenizer.ggml.add_sep_token": "llama.cpp writes it in BERT's vocabularies alone",
        "tokenizer.ggml.cls_token_id": "a name alone: what is written before a text is bos",
        "tokenizer.ggml.fim_*_token_id": "names of tokens to fill in the middle",
        "tokenizer.ggml.prefix_token_id": "an old name of such a token",
        "tokenizer.ggml.suffix_token_id": "an old name of such a token",
        "tokenizer.ggml.middle_token_id": "an old name of such a token",
    },
    refused={
        "general.type": Refusal("the file holds no model", unless=("model",)),
        "general.sampling.*": Refusal("no such sampler is here: remove the key", unless=_OFF),
        "tokenizer.ggml.remove_extra_whitespaces": Refusal(
            "llama.cpp obeys it in Unigram vocabularies alone"
        ),
        "tokenizer.ggml.precompiled_charsmap": Refusal(
            "llama.cpp obeys it in Unigram vocabularies alone", unless=([],)
        ),
        "tokenizer.ggml.suppress_tokens": Refusal("use --banned", unless=([],)),
        "tokenizer.ggml.normalizer.*": Refusal("it belongs to BERT's vocabularies"),
        "adapter.*": Refusal("adapters are read from PEFT folders, with --adapter"),
        "clip.*": Refusal("encoders of images and sound are not supported"),
    },
)


def _settings_table(architecture: str) -> KeyTable:
    """What becomes of the keys below the architecture's name."""
    used = _keys("", "block_count context_length embedding_length feed_forward_length vocab_size")
    used += _keys("attention.", "head_count head_count_kv key_length value_length sliding_window")
    no_effect = {
        "rope.scaling.finetuned": "says how the model was trained",
        "tensor_data_layout": "says how the file was converted",
    }
    refused = {
        "expert_*": Refusal("mixtures of experts are not", unless=_OFF),
        "attention.causal": Refusal("only causal models are", unless=(True,)),
        "pooling_type": Refusal("embedding models are not", unless=(0,)),
        "classifier.*": Refusal("classifiers are read from Hugging Face folders"),
        "rope.scaling.yarn_ext_factor": Refusal("YaRN has 1", unless=(1.0, -1.0)),
        "rope.scaling.yarn_attn_factor": Refusal("use attn_factor", unless=(1.0,)),
        "rope.scaling.yarn_log_multiplier": Refusal("mscale is not", unless=_OFF),
        "rope.scaling.alpha": Refusal("this scaling is not", unless=_OFF),
        "rope.dimension_sections": Refusal("positions of images are not", unless=([],)),
    }
    for key in ("logit_scale", "residual_scale", "embedding_scale"):
        refused[key] = Refusal("this family has no such factor", unless=(*_OFF, 1, 1.0))
    for key in (
        *("attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
        *("attention.scale", "attention.output_scale", "attention.clamp_kqv", "swin_norm"),
        *("attention.max_alibi_bias", "attention.temperature_*", "attention.shared_kv_layers"),
        *("attention.sliding_window_pattern", "nextn_predict_layers", "leading_dense_block_count"),
    ):
        refused[key] = Refusal("this family has no such setting", unless=(*_OFF, []))
    if architecture == "gpt2":
        used += ["attention.layer_norm_epsilon"]
        no_effect |= {"rope.*": "GPT-2 has learned positions"}
        refused = {key: why for key, why in refused.items() if not key.startswith("rope.")}
    else:
        used += ["attention.layer_norm_rms_epsilon"]
        used += _keys("rope.", "freq_base dimension_count scale_linear")
        used += _keys("rope.scaling.", "type factor original_context_length attn_factor")
        used += _keys("rope.scaling.yarn_", "beta_fast beta_slow")
        no_effect["attention.layer_norm_epsilon"] = "the norms are RMS norms"
    return KeyTable(
        f"GGUF: keys of {architecture}",
        used=frozenset(f"{architecture}.{key}" for key in used),
        no_effect={f"{architecture}.{key}": why for key, why in no_effect.items()},
        refused={f"{architecture}.{key}": refusal for key, refusal in refused.items()},
    )


SETTINGS_KEYS = {name: _settings_table(name) for name in ARCHITECTURES}
KEY_TABLES = (FILE_KEYS, *SETTINGS_KEYS.values())


def check_keys(meta: Mapping[str, Any], architecture: str, where: str) -> None:
    """Refuses by name what cannot be honoured. Raises UserError."""
    own = {k: v for k, v in meta.items() if k.startswith(architecture + ".")}
    SETTINGS_KEYS[architecture].check(own, where)
    FILE_KEYS.check({k: v for k, v in meta.items() if k not in own}, where)


# {general.sampling's key: generation_config.json's}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def read_generation(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended sampling in the words of generation_config.json."""
    values: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        if (value := meta.get(f"general.sampling.{key}")) is not None:
            # float32 in the file: the shortest number that rounds to it is the one meant
            values[name] = value if isinstance(value, int) else float(str(np.float32(value)))
    return {"do_sample": values.get("temperature", 1.0) > 0, **values} if values else {}


def write_generation(generation: Mapping[str, Any]) -> Iterator[tuple[str, float | int]]:
    """(key, value) of the sampling that a file can recommend; the rest is said."""
    known = {*_SAMPLING.values(), "do_sample", "transformers_version", "_from_model_config"}
    values = {k: v for k, v in generation.items() if v is not None and not k.endswith("_token_id")}
    if others := sorted(values.keys() - known):
        cli.say(f"note: a GGUF file has no place for {', '.join(others)} of the generation config")
    if generation.get("do_sample") is False:
        return
    for key, name in _SAMPLING.items():
        if generation.get(name) is not None:
            value = generation[name]
            yield f"general.sampling.{key}", int(value) if key == "top_k" else float(value)


class _Settings:
    """The keys below an architecture's name. Raises UserError for missing and odd ones."""

    def __init__(self, meta: Mapping[str, Any], architecture: str):
        self._meta, self._architecture = meta, architecture

    def get(self, name: str, default: Any = None) -> Any:
        key = f"{self._architecture}.{name}"
        value = self._meta.get(key, default)
        if value is None:
            raise UserError(f"the GGUF file has no {key}")
        if isinstance(value, list):  # one for each layer
            if len(set(value)) != 1:
                raise UserError(f"{key} differs from layer to layer, which is not supported")
            value = value[0]
        return value


# {Hugging Face's setting: (GGUF's, default or None)}; a setting without a default must be there.
_GPT2_SETTINGS = {
    "n_layer": ("block_count", None),
    "n_embd": ("embedding_length", None),
    "n_head": ("attention.head_count", None),
    "n_inner": ("feed_forward_length", None),
    "n_positions": ("context_length", None),
    "layer_norm_epsilon": ("attention.layer_norm_epsilon", None),
}
_SETTINGS = {
    "num_hidden_layers": ("block_count", None),
    "hidden_size": ("embedding_length", None),
    "num_attention_heads": ("attention.head_count", None),
    "intermediate_size": ("feed_forward_length", None),
    "max_position_embeddings": ("context_length", None),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", None),
    "rope_theta": ("rope.freq_base", 10_000.0),
}


def read_config(
    meta: Mapping[str, Any],
    architecture: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """The file's settings in the words of Hugging Face's config.json.

    shapes, read: of the file's tensors under its own names. Raises UserError.
    """
    family, settings = ARCHITECTURES[architecture], _Settings(meta, architecture)
    get = settings.get
    names = _GPT2_SETTINGS if architecture == "gpt2" else _SETTINGS
    raw = {key: get(name, default) for key, (name, default) in names.items()}
    raw["model_type"] = family.model_type
    raw["vocab_size"] = shapes.get("token_embd.weight", (0,))[0]
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise UserError("keys and values of different widths (key_length) are not supported")
    window = get("attention.sliding_window", 0)
    assert family.gguf is not None
    if 0 < window < get("context_length") and not family.gguf.sliding_window:
        raise UserError(f"{architecture}.attention.sliding_window = {window} is not supported")
    if architecture == "gpt2":
        kv = get("attention.head_count_kv", heads)
        if (kv, head_dim * heads) != (heads, width):
            raise UserError(f"GPT-2 with {kv} heads of keys and {head_dim} dims is not supported")
        return raw
    raw["num_key_value_heads"] = get("attention.head_count_kv", heads)
    raw["head_dim"] = head_dim
    if family.model_type == "llama":  # Qwen2's biases go without saying, and Qwen3 has none there
        raw["attention_bias"] = "blk.0.attn_q.bias" in shapes
        raw["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if family.gguf.neighbours_rotate:
            raise UserError(
                f"{architecture}.rope.dimension_count = {rotated} of {head_dim} dims is not "
                "supported (nor is it in llama.cpp)"
            )
        raw["partial_rotary_factor"] = rotated / head_dim
    if family.gguf.sliding_window:
        raw["sliding_window"] = window
    if scaling := _read_scaling(settings, raw, shapes, read):
        raw["rope_scaling"] = scaling
    return raw


def _read_scaling(
    settings: _Settings,
    raw: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """The scaling of RoPE in config.json's words; empty for none. Raises UserError."""
    kind = settings.get("rope.scaling.type", "linear")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 0.0)) or 1.0
    attention_factor = settings.get("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"rope.scaling.type = {kind!r} is not supported: none, linear and yarn are")
    is_scaled = kind != "none" and factor != 1.0
    if attention_factor != 1.0 and not (is_scaled and kind == "yarn"):
        raise UserError(f"rope.scaling.attn_factor = {attention_factor} is supported in YaRN alone")
    if ROPE_DIVISORS in shapes:
        if is_scaled:
            raise UserError(f"{ROPE_DIVISORS} together with rope.scaling.factor is not supported")
        return _llama3_scaling(read(ROPE_DIVISORS), raw)
    if not is_scaled:
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = settings.get(
            "rope.scaling.original_context_length", raw["max_position_embeddings"]
        )
        scaling["beta_fast"] = settings.get("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = settings.get("rope.scaling.yarn_beta_slow", 1.0)
        if attention_factor != 1.0:
            scaling["attention_factor"] = attention_factor * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3_scaling(divisors: np.ndarray, raw: dict[str, Any]) -> dict[str, Any]:
    """The Llama 3 scaling that has these divisors of frequencies. Raises UserError."""
    factor = float(divisors.max(initial=1.0))
    for original in (8192, *_original_contexts(divisors, factor, raw["rope_theta"])):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        config = huggingface.read_settings({**raw, "rope_scaling": scaling})
        if np.allclose(rope_divisors(config), divisors, rtol=1e-3):
            return scaling
    raise UserError(
        f"the GGUF file scales RoPE by {ROPE_DIVISORS} in a way that no Llama 3 does: not supported"
    )


def _original_contexts(divisors: np.ndarray, factor: float, theta: float) -> Iterator[int]:
    """Original contexts that could have given these divisors.

    A frequency that makes 4 turns over it is not divided, one that makes 1 turn is divided by the
    factor, and between the two 1 / divisor goes in a line.
    """
    frequencies = theta ** (-np.arange(len(divisors)) / len(divisors))
    for i in np.flatnonzero((divisors > 1.001) & (divisors < factor * 0.999)):
        unscaled = (1 / divisors[i] - 1 / factor) / (1 - 1 / factor)
        yield round(2 * math.pi * (1 + 3 * unscaled) / frequencies[i])
    least = 2 * math.pi * 4 / frequencies[divisors < 1.001].min(initial=np.inf)
    most = 2 * math.pi / frequencies[divisors > 1.001].max(initial=1e-9)
    yield from (2**k for k in range(31) if least <= 2**k <= most)
    yield max(math.ceil(least), 1)


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """What the scaling divides each RoPE frequency by, float32 [R/2]."""
    unscaled = _first_angles(dataclasses.replace(config, rope_scaling="none"))
    return (unscaled / _first_angles(config)).astype(np.float32)


def _first_angles(config: ModelConfig) -> np.ndarray:
    """The angles [R/2] at position 1, which are the frequencies, from their cos and sin."""
    cos, sin = rope_tables(config, jnp.ones((1, 1), jnp.int32))
    return np.arctan2(np.asarray(sin)[0, 0], np.asarray(cos)[0, 0])


def write_settings(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """(key below the architecture, value) of the settings that `read_config` reads."""
    yield "block_count", config.layers
    yield "context_length", config.context
    yield "embedding_length", config.width
    yield "feed_forward_length", config.mlp_width
    yield "attention.head_count", config.heads
    if config.positions == "learned":  # GPT-2
        yield "attention.layer_norm_epsilon", config.norm_eps
        return
    yield "attention.head_count_kv", config.kv
    yield "attention.layer_norm_rms_epsilon", config.norm_eps
    yield "rope.freq_base", config.rope_theta
    yield "attention.key_length", config.head_width
    yield "attention.value_length", config.head_width
    yield "rope.dimension_count", config.rotary_width
    yield "vocab_size", config.vocab_size
    if config.sliding_window:
        yield "attention.sliding_window", config.sliding_window
    if config.rope_scaling in ("linear", "yarn"):
        yield "rope.scaling.type", config.rope_scaling
        yield "rope.scaling.factor", config.rope_factor
        yield "rope.scaling.original_context_length", config.rope_original_context
    if config.rope_scaling == "yarn" and config.rope_attention_factor:
        usual = 0.1 * math.log(config.rope_factor) + 1.0
        yield "rope.scaling.attn_factor", config.rope_attention_factor / usual


# Settings of a run or of memory, and those that are compared as what follows from them.
_NOT_COMPARED = frozenset(
    _keys("", "dropout init_std family dtype implementation attention attention_block scan_layers")
    + _keys("", "remat vocab_multiple head_dim kv_heads mlp_dim")
    + _keys("rope_", "theta scaling factor low_freq_factor high_freq_factor beta_fast beta_slow")
    + _keys("rope_", "attention_factor original_context")
)


def find_lost_settings(config: ModelConfig, rebuilt: ModelConfig) -> list[str]:
    """What of a model's config is another one in the config that a written file gives."""
    lost = []
    names = [f.name for f in dataclasses.fields(config) if f.name not in _NOT_COMPARED]
    for name in [*names, "head_width", "kv", "mlp_width"]:
        value, other = getattr(config, name), getattr(rebuilt, name)
        is_close = isinstance(value, float) and math.isclose(value, other, rel_tol=1e-6)
        if value != other and not is_close:
            lost.append(f"{name} = {value!r}")
    if config.positions == "rope":
        at = jnp.asarray([[1, 3]], jnp.int32)
        pairs = zip(rope_tables(config, at), rope_tables(rebuilt, at), strict=True)
        if any(a.shape != b.shape or not np.allclose(a, b, atol=1e-5) for a, b in pairs):
            lost.append(f"the RoPE settings ({config.rope_scaling})")
    return lost
