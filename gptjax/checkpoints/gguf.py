"""GGUF files, read as if they were Hugging Face checkpoints and written from our parameters.

`read_gguf` gives what `safetensors.LazyParams` needs: a config, tensors under Hugging Face's names,
and the tokenizer in the file. The package `gguf` knows the format and its quantisations; here only
names, settings and the order of a few axes are translated. Written are f32, f16 and q8_0.

A family says how GGUF names it (`GgufNames` in `families/common.py`); gguf_vocabulary.py has the
tokenizer.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints import huggingface, mapping
from gptjax.checkpoints.families.common import Family
from gptjax.checkpoints.gguf_vocabulary import read_tokenizer, write_vocabulary
from gptjax.checkpoints.safetensors import StoredTensors
from gptjax.checkpoints.tensor_map import RawConfig
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.model.rope import rope_tables
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.pretrained import PretrainedTokenizer

# {GGUF's architecture: our family}
ARCHITECTURES: dict[str, Family] = {
    family.gguf.architecture: family for family in huggingface.FAMILIES.values() if family.gguf
}

# A file with llama3 scaling holds what each RoPE frequency is divided by.
_ROPE_DIVISORS = "rope_freqs.weight"

Shape = tuple[int, ...]


class GgufFile(NamedTuple):
    """What a GGUF file holds. tensors: under Hugging Face's names, read as float32."""

    config: ModelConfig
    family: Family
    tensors: StoredTensors
    tokenizer: Tokenizer | None


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'gptjax[gguf]'") from None
    return gguf


class _Translation:
    """The names and the layout of one model's tensors in GGUF, against Hugging Face's."""

    def __init__(self, config: ModelConfig, family: Family):
        assert family.gguf is not None  # whoever calls has looked
        self._config, self._names = config, family.gguf
        self._kernels_in_out = family.kernels_in_out

    def gguf_name(self, hf_name: str) -> str:
        """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
        module, _, kind = hf_name.rpartition(".")
        parts = module.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                inner = ".".join(parts[i + 1 :])
                return f"blk.{part}.{self._names.modules[inner]}.{kind}"
        return f"{self._names.modules[module]}.{kind}"

    def swaps_axes(self, hf_name: str, shape: Shape) -> bool:
        """Whether this is a kernel [in, out] there; GGUF has [out, in] always."""
        return self._kernels_in_out and len(shape) == 2 and ".h." in hf_name

    def shape(self, hf_name: str, shape: Shape) -> Shape:
        """The shape on the other side, in both directions."""
        return shape[::-1] if self.swaps_axes(hf_name, shape) else shape

    def to_gguf(self, hf_name: str, array: np.ndarray) -> np.ndarray:
        if heads := self._rotated_heads(hf_name):
            return self._reorder_pairs(array, heads, (2, self._config.head_width // 2))
        return array.T if self.swaps_axes(hf_name, array.shape) else array

    def from_gguf(self, hf_name: str, array: np.ndarray) -> np.ndarray:
        if heads := self._rotated_heads(hf_name):
            return self._reorder_pairs(array, heads, (self._config.head_width // 2, 2))
        return array.T if self.swaps_axes(hf_name, array.shape) else array

    def _rotated_heads(self, hf_name: str) -> int:
        """The heads of a tensor whose rows are in another order in GGUF; 0 for other tensors."""
        if self._names.neighbours_rotate and "self_attn.q_proj" in hf_name:
            return self._config.heads
        if self._names.neighbours_rotate and "self_attn.k_proj" in hf_name:
            return self._config.kv
        return 0

    def _reorder_pairs(self, array: np.ndarray, heads: int, pairs: tuple[int, int]) -> np.ndarray:
        """Rows [heads * C, ...] with the two axes of `pairs`, into which C splits, exchanged.

        RoPE turns the dims (i, i + C/2) of a head here and the neighbours (2i, 2i + 1) in GGUF.
        """
        split = array.reshape(heads, *pairs, *array.shape[1:])
        return split.swapaxes(1, 2).reshape(array.shape)


# Reading


def read_gguf(path: Path) -> GgufFile:
    """Opens a GGUF file; its tensors are read later. Raises UserError."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # for damage the reader raises whatever NumPy does
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise UserError(f"{path} is no readable GGUF file: {reason}") from None
    architecture = meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        problem = unknown_name("GGUF architecture", str(architecture), list(ARCHITECTURES))
        raise UserError(f"{path}: {problem}")
    family = ARCHITECTURES[architecture]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        raw = _hf_config(meta, architecture, family, stored)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is of a wrong type: {error}") from None
    config = huggingface.read_config(raw)
    # before names are spelled out: a damaged number of layers can be huge
    if config.layers > len(stored):
        raise UserError(f"{path} names {config.layers:,} layers and holds {len(stored):,} tensors")
    tensors = _stored_tensors(gguf, reader, stored, _Translation(config, family), config, family)
    return GgufFile(config, family, tensors, read_tokenizer(meta, path))


def _stored_tensors(
    gguf: Any,
    reader: Any,
    stored: Mapping[str, Any],
    translation: _Translation,
    config: ModelConfig,
    family: Family,
) -> StoredTensors:
    """The file's tensors under Hugging Face's names; unknown ones keep their own."""
    hf_names = {}
    for group in mapping.hf_tensors(config, family):
        for hf_name in group.shapes:
            hf_names[translation.gguf_name(hf_name)] = hf_name
    shapes = {}
    for name, tensor in stored.items():
        if name != _ROPE_DIVISORS:
            hf_name = hf_names.get(name, name)
            shapes[hf_name] = translation.shape(hf_name, _numpy_shape(tensor))
    mapped = getattr(reader.data, "_mmap", None)

    def read(hf_name: str) -> np.ndarray:
        tensor = stored[translation.gguf_name(hf_name)]
        # what was read before leaves memory, which would hold the file next to the model
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        return translation.from_gguf(hf_name, array.reshape(_numpy_shape(tensor)))

    return StoredTensors(shapes, read)


def _numpy_shape(tensor: Any) -> Shape:
    """GGUF counts axes from the innermost."""
    return tuple(int(n) for n in tensor.shape[::-1])


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


def _hf_config(
    meta: Mapping[str, Any], architecture: str, family: Family, stored: Mapping[str, Any]
) -> dict[str, Any]:
    """The file's settings in the words of Hugging Face's config.json. Raises UserError."""

    def get(name: str, default: Any = None) -> Any:
        value = meta.get(f"{architecture}.{name}", default)
        if value is None:
            raise UserError(f"the GGUF file has no {architecture}.{name}")
        return value

    is_gpt2 = family.model_type == "gpt2"
    settings = _GPT2_SETTINGS if is_gpt2 else _SETTINGS
    raw = {key: get(name, default) for key, (name, default) in settings.items()}
    table = stored.get("token_embd.weight")
    raw["model_type"] = family.model_type
    raw["vocab_size"] = int(table.shape[-1]) if table is not None else 0
    raw["tie_word_embeddings"] = "output.weight" not in stored
    if is_gpt2:
        return raw
    heads = raw["num_attention_heads"]
    raw["num_key_value_heads"] = get("attention.head_count_kv", heads)
    raw["head_dim"] = get("attention.key_length", raw["hidden_size"] // heads)
    # Qwen2's biases on q, k and v go without saying
    raw["attention_bias"] = family.model_type == "llama" and "blk.0.attn_q.bias" in stored
    rotated = get("rope.dimension_count", raw["head_dim"])
    if rotated != raw["head_dim"]:
        raw["partial_rotary_factor"] = rotated / raw["head_dim"]
    if family.gguf is not None and family.gguf.sliding_window:
        raw["sliding_window"] = get("attention.sliding_window", 0)
    scaling, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    if scaling in ("linear", "yarn") and factor != 1.0:
        context = raw["max_position_embeddings"]
        raw["rope_scaling"] = {
            "rope_type": scaling,
            "factor": factor,
            "original_max_position_embeddings": get(
                "rope.scaling.original_context_length", context
            ),
        }
    elif _ROPE_DIVISORS in stored:
        divisors = np.asarray(stored[_ROPE_DIVISORS].data, np.float32)
        raw["rope_scaling"] = _llama3_scaling(divisors, raw)
    return raw


def _llama3_scaling(divisors: np.ndarray, raw: RawConfig) -> dict[str, Any]:
    """Which published Llama 3 scaling has these divisors of frequencies. Raises UserError."""
    for factor in (8.0, 32.0):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = huggingface.read_config({**raw, "rope_scaling": scaling})
        if np.allclose(_rope_divisors(config), divisors, rtol=1e-3):
            return scaling
    raise UserError(
        f"the GGUF file scales RoPE by {_ROPE_DIVISORS} in a way that no published Llama 3 does: "
        "not supported"
    )


def _rope_divisors(config: ModelConfig) -> np.ndarray:
    """What the scaling divides each RoPE frequency by, float32 [R/2]."""
    unscaled = _first_angles(dataclasses.replace(config, rope_scaling="none"))
    return (unscaled / _first_angles(config)).astype(np.float32)


def _first_angles(config: ModelConfig) -> np.ndarray:
    """The angles [R/2] at position 1, which are the frequencies, from their cos and sin."""
    cos, sin = rope_tables(config, jnp.ones((1, 1), jnp.int32))
    return np.arctan2(np.asarray(sin)[0, 0], np.asarray(cos)[0, 0])


# Writing


def _settings_to_write(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """(key below the architecture, value) of the settings that `_hf_config` reads."""
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


def _refuse_what_is_lost(config: ModelConfig, family: Family) -> None:
    """Raises UserError for what a GGUF file has no setting for."""
    has_window = family.gguf is not None and family.gguf.sliding_window
    usual_yarn = (32.0, 1.0, 0.0)
    yarn = (config.rope_beta_fast, config.rope_beta_slow, config.rope_attention_factor)
    lost = []
    if config.labels:
        lost.append("a classification head")
    if config.sliding_window and not has_window:
        lost.append("a sliding window")
    if config.positions == "learned" and config.mlp != "gelu":
        lost.append("exact GELU")
    if config.rope_scaling == "yarn" and yarn != usual_yarn:
        lost.append("YaRN's beta or attention factor")
    if lost:
        raise UserError(f"a GGUF file does not carry {', '.join(lost)}: use --format=hf")


class _PlannedTensor(NamedTuple):
    """A tensor that is announced in the file's header and written after it."""

    hf_name: str
    make: Callable[[], np.ndarray]
    quantisation: Any  # a gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer | None,
    *,
    dtype: str,
    name: str,
) -> None:
    """Writes one GGUF file; tensors are made and written one by one. Raises UserError.

    dtype: float32, float16 or q8_0, of matrices; vectors stay float32. name: `general.name`.
    """
    gguf = _package()
    family = huggingface.family_of(config)
    types = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    _refuse_what_is_lost(config, family)
    if family.gguf is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"GGUF export knows {known}, not {family.model_type}: use --format=hf")
    if dtype not in types:
        raise UserError(f"--dtype={dtype}: GGUF files are written as {', '.join(types)}")
    writer = gguf.GGUFWriter(path, family.gguf.architecture)
    writer.add_name(name)
    for key, value in _settings_to_write(config):
        _add_setting(writer, f"{family.gguf.architecture}.{key}", value)
    if isinstance(tokenizer, PretrainedTokenizer):
        write_vocabulary(writer, tokenizer, config.vocab_size)
    translation = _Translation(config, family)
    plan = []
    for hf_name, shape, make in mapping.from_params(config, params):
        # q8_0 quantises 32 neighbours at a time
        fits = len(shape) > 1 and (dtype != "q8_0" or shape[-1] % 32 == 0)
        quantisation = types[dtype if fits else "float32"]
        plan.append(_PlannedTensor(hf_name, make, quantisation))
        gguf_shape = translation.shape(hf_name, shape)
        _announce(writer, gguf, translation.gguf_name(hf_name), gguf_shape, quantisation)
    divisors = _rope_divisors(config) if config.rope_scaling == "llama3" else None
    if divisors is not None:
        writer.add_tensor_info(_ROPE_DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        array = translation.to_gguf(tensor.hf_name, tensor.make().astype(np.float32, copy=False))
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(array), tensor.quantisation))
    if divisors is not None:
        writer.write_tensor_data(divisors)
    writer.close()


def _add_setting(writer: Any, key: str, value: str | float | int) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _announce(writer: Any, gguf: Any, name: str, shape: Shape, quantisation: Any) -> None:
    """Adds a tensor to the header, before its bytes are there."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    nbytes = int(np.prod(shape)) // block * block_bytes
    if quantisation == gguf.GGMLQuantizationType.F32:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
    elif quantisation == gguf.GGMLQuantizationType.F16:
        writer.add_tensor_info(name, shape, np.dtype(np.float16), nbytes)
    else:  # blocks of bytes
        byte_shape = gguf.quant_shape_to_byte_shape(shape, quantisation)
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), nbytes, raw_dtype=quantisation)
