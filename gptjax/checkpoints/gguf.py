"""GGUF files, read as if they were Hugging Face checkpoints and written from our parameters.

`read_gguf` gives what `safetensors.LazyParams` needs: a config, tensors under Hugging Face's names,
and the tokenizer in the file. Here names and the order of a few axes are translated; gguf_file.py
has the container, gguf_keys.py the settings, gguf_vocabulary.py the tokenizer. Written are f32, f16
and q8_0. A family says how GGUF names it (`GgufNames` in `families/common.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.checkpoints import gguf_file, gguf_keys, huggingface, mapping
from gptjax.checkpoints.families.common import Family
from gptjax.checkpoints.gguf_file import Shape
from gptjax.checkpoints.gguf_keys import ARCHITECTURES, ROPE_DIVISORS
from gptjax.checkpoints.gguf_vocabulary import read_special_ids, read_tokenizer
from gptjax.checkpoints.gguf_write_vocabulary import write_vocabulary
from gptjax.checkpoints.safetensors import StoredTensors
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.pretrained import PretrainedTokenizer


class GgufFile(NamedTuple):
    """What a GGUF file holds. tensors: under Hugging Face's names, read as float32.

    generation, special_ids: what generation_config.json and config.json would say.
    """

    config: ModelConfig
    family: Family
    tensors: StoredTensors
    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    special_ids: dict[str, int]


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


# ---- Reading


def read_gguf(path: Path) -> GgufFile:
    """Opens a GGUF file, or all parts of a split one; its tensors are read later.

    Raises UserError.
    """
    header = gguf_file.read_header(path)
    architecture = header.meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        problem = unknown_name("GGUF architecture", str(architecture), list(ARCHITECTURES))
        raise UserError(f"{path}: {problem}")
    gguf_keys.check_keys(header.meta, architecture, str(path))
    family = ARCHITECTURES[architecture]
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    read = gguf_file.reader(header.tensors)
    try:
        raw = gguf_keys.read_config(header.meta, architecture, shapes, read)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is of a wrong type: {error}") from None
    config = huggingface.read_settings(raw)
    # before names are spelled out: a damaged number of layers can be huge
    if config.layers > len(shapes):
        raise UserError(f"{path} names {config.layers:,} layers and holds {len(shapes):,} tensors")
    tensors = _stored_tensors(shapes, read, _Translation(config, family), config, family)
    tokenizer = read_tokenizer(header.meta, path)
    generation = gguf_keys.read_generation(header.meta)
    special_ids = read_special_ids(header.meta) if tokenizer else {}
    return GgufFile(config, family, tensors, tokenizer, generation, special_ids)


def _stored_tensors(
    stored: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    translation: _Translation,
    config: ModelConfig,
    family: Family,
) -> StoredTensors:
    """The file's tensors under Hugging Face's names. Raises UserError for unknown ones."""
    hf_names = {}
    for group in mapping.hf_tensors(config, family):
        for hf_name in group.shapes:
            hf_names[translation.gguf_name(hf_name)] = hf_name
    unknown = [name for name in stored if name not in hf_names and name != ROPE_DIVISORS]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"the tensor {unknown[0]}{more} has no place in a {family.model_type} model of these "
            "settings, so it is not read"
        )
    shapes = {}
    for name, shape in stored.items():
        if name != ROPE_DIVISORS:
            shapes[hf_names[name]] = translation.shape(hf_names[name], shape)

    def read_translated(hf_name: str) -> np.ndarray:
        return translation.from_gguf(hf_name, read(translation.gguf_name(hf_name)))

    return StoredTensors(shapes, read_translated)


# ---- Writing


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
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes one GGUF file; tensors are made and written one by one. Raises UserError.

    dtype: float32, float16 or q8_0, of matrices; vectors stay float32. name: `general.name`.
    generation: as in generation_config.json; the sampling in it is written.
    """
    gguf = gguf_file.package()
    family = huggingface.family_of(config)
    types = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    architecture = _architecture_of(config, family)
    if dtype not in types:
        raise UserError(f"--dtype={dtype}: GGUF files are written as {', '.join(types)}")
    divisors = gguf_keys.rope_divisors(config) if config.rope_scaling == "llama3" else None
    translation = _Translation(config, family)
    tensors = list(mapping.from_params(config, params))
    shapes = {translation.gguf_name(n): translation.shape(n, shape) for n, shape, _ in tensors}
    _refuse_what_is_lost(config, architecture, shapes, divisors)
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in gguf_keys.write_settings(config):
            _add_setting(writer, f"{architecture}.{key}", value)
        for key, value in gguf_keys.write_generation(generation or {}):
            _add_setting(writer, key, value)
        if isinstance(tokenizer, PretrainedTokenizer):
            write_vocabulary(writer, tokenizer, config.vocab_size, name)
        else:
            writer.add_name(name)
        plan = []
        for hf_name, shape, make in tensors:
            # q8_0 quantises 32 neighbours at a time
            fits = len(shape) > 1 and (dtype != "q8_0" or shape[-1] % 32 == 0)
            quantisation = types[dtype if fits else "float32"]
            plan.append(_PlannedTensor(hf_name, make, quantisation))
            gguf_name = translation.gguf_name(hf_name)
            _announce(writer, gguf, gguf_name, shapes[gguf_name], quantisation)
        if divisors is not None:
            writer.add_tensor_info(ROPE_DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            array = tensor.make().astype(np.float32, copy=False)
            array = np.ascontiguousarray(translation.to_gguf(tensor.hf_name, array))
            writer.write_tensor_data(gguf.quantize(array, tensor.quantisation))
        if divisors is not None:
            writer.write_tensor_data(divisors)
    finally:
        writer.close()


def _architecture_of(config: ModelConfig, family: Family) -> str:
    """GGUF's name for the model. Raises UserError where such files hold none of its kind."""
    if family.gguf is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"GGUF export knows {known}, not {family.model_type}: use --format=hf")
    if config.labels:
        raise UserError(
            "a GGUF file has no place for a classification head, and this one tells "
            f"{', '.join(config.labels)} apart: use --format=hf"
        )
    return family.gguf.architecture


def _refuse_what_is_lost(
    config: ModelConfig,
    architecture: str,
    shapes: Mapping[str, Shape],
    divisors: np.ndarray | None,
) -> None:
    """Reads the settings as a reader of the file would. Raises UserError for what is another."""
    meta = {f"{architecture}.{key}": value for key, value in gguf_keys.write_settings(config)}
    contents = {} if divisors is None else {ROPE_DIVISORS: divisors}
    shapes = {**shapes, **{name: array.shape for name, array in contents.items()}}
    try:
        raw = gguf_keys.read_config(meta, architecture, shapes, contents.__getitem__)
        lost = gguf_keys.find_lost_settings(config, huggingface.read_settings(raw))
    except UserError as error:
        lost = [str(error)]
    if lost:
        raise UserError(f"a GGUF file does not carry {', '.join(lost)}: use --format=hf")


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
