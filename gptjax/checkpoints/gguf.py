"""GGUF files, read as if they were Hugging Face checkpoints and written from our parameters (f32, f16, q8_0).

`read` gives what `transfer.Stored` needs: a config in Hugging Face's words, tensors under Hugging Face's names, and the tokenizer inside
the file. The package `gguf` knows the format and its quantisations; only names and the order of rotary rows are translated here.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints import huggingface, mapping
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.model.rope import rope_tables
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.pretrained import PretrainedTokenizer, byte_level_json, pieces_json

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_GPT2 = {
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
}


# GGUF's architecture: (Hugging Face's, names of modules there: here)
ARCHITECTURES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
}


# How text is cut before byte-level merging, by GGUF's name: (each digit apart, pattern or "" for GPT-2's).
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_CUTS: dict[str, tuple[bool, str]] = {
    "default": (False, ""),
    "gpt-2": (False, ""),
    "smollm": (True, ""),
    "llama-bpe": (False, _LLAMA3),
    "qwen2": (False, _LLAMA3.replace("{1,3}", "")),
}


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'gptjax[gguf]'") from None
    return gguf


def _theirs(name: str, table: Mapping[str, str]) -> str:
    """GGUF's name of a Hugging Face tensor: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return f"{table[module]}.{kind}"
    return f"blk.{parts[number]}.{table['.'.join(parts[number + 1 :])]}.{kind}"


def _interleave(c: ModelConfig, rows: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Rows of q or k in GGUF's order for Llama, where RoPE turns neighbours, from rotate-half's order (`back`: the other way)."""
    middle = (c.head_width // 2, 2) if back else (2, c.head_width // 2)
    return rows.reshape(heads, *middle, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(
    meta: Mapping[str, Any], architecture: str, kind: str, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The file's settings in the words of Hugging Face's config.json."""

    def get(name: str, default: Any = None) -> Any:
        value = meta.get(f"{architecture}.{name}", default)
        if value is None:
            raise UserError(f"the GGUF file has no {architecture}.{name}")
        return value

    width, heads, layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    vocabulary = (
        int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else 0
    )
    tied = "output.weight" not in tensors
    if kind == "gpt2":
        eps = get("attention.layer_norm_epsilon")
        raw = {
            "n_layer": layers,
            "n_embd": width,
            "n_head": heads,
            "n_inner": get("feed_forward_length"),
            "n_positions": get("context_length"),
        }
        return {
            "model_type": kind,
            **raw,
            "layer_norm_epsilon": eps,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        }
    raw = {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "head_dim": get("attention.key_length", width // heads),
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
    }
    scaling, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    if scaling in ("linear", "yarn") and factor != 1.0:
        original = get("rope.scaling.original_context_length", raw["max_position_embeddings"])
        raw["rope_scaling"] = {
            "rope_type": scaling,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    elif "rope_freqs.weight" in tensors:
        raw["rope_scaling"] = _llama3_scaling(
            np.asarray(tensors["rope_freqs.weight"].data, np.float32), raw
        )
    return raw


def _llama3_scaling(divisors: np.ndarray, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Which published Llama 3 scaling the file's frequency divisors are."""
    for factor in (8.0, 32.0):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if np.allclose(
            _divisors(huggingface.read_config({**raw, "rope_scaling": scaling})),
            divisors,
            rtol=1e-3,
        ):
            return scaling
    raise UserError(
        "the GGUF file scales RoPE by rope_freqs.weight in a way that no published Llama 3 does: not supported"
    )


def _divisors(c: ModelConfig) -> np.ndarray:
    """Unscaled over scaled RoPE frequencies, float32 [R/2]."""
    one = jnp.ones((1, 1), jnp.int32)
    angles = [
        np.arctan2(*(np.asarray(t)[0, 0] for t in rope_tables(x, one)[::-1]))
        for x in (dataclasses.replace(c, rope_scaling="none"), c)
    ]
    return (angles[0] / angles[1]).astype(np.float32)


def read_gguf(
    path: Path,
) -> tuple[
    dict[str, Any], dict[str, tuple[int, ...]], Callable[[str], np.ndarray], Tokenizer | None
]:
    """(config in Hugging Face's words, {Hugging Face's name: shape}, name -> float32 array, tokenizer). Raises UserError."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader meets damage with whatever NumPy raises
        raise UserError(
            f"{path} is no readable GGUF file: {type(error).__name__}: {str(error)[:150]}"
        ) from None
    architecture = meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: {unknown_name('GGUF architecture', str(architecture), list(ARCHITECTURES))}"
        )
    kind, table = ARCHITECTURES[architecture]
    tensors = {t.name: t for t in reader.tensors}
    try:
        raw = _config(meta, architecture, kind, tensors)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is of a wrong type: {error}") from None
    c = huggingface.read_config(raw)
    if c.layers > len(tensors):
        raise UserError(f"{path} names {c.layers:,} layers and holds {len(tensors):,} tensors")
    full = [name for _, _, group in mapping.foreign_tensors(c, kind) for name, _ in group]
    names = {_theirs(name, table): name for name in full}
    conv, mapped = kind == "gpt2", getattr(reader.data, "_mmap", None)

    def get(name: str) -> np.ndarray:
        tensor = tensors[_theirs(name, table)]
        if mapped is not None and hasattr(
            mmap, "MADV_DONTNEED"
        ):  # what was read before leaves memory, which would hold the file beside the model
            mapped.madvise(mmap.MADV_DONTNEED)
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        array = array.reshape(tuple(int(n) for n in tensor.shape[::-1]))
        if kind == "llama" and "self_attn.q_proj" in name:
            return _interleave(c, array, c.heads, back=True)
        if kind == "llama" and "self_attn.k_proj" in name:
            return _interleave(c, array, c.kv, back=True)
        return array.T if conv and array.ndim == 2 and ".h." in name else array

    found = {}
    for theirs, tensor in tensors.items():
        shape = tuple(int(n) for n in tensor.shape[::-1])
        name = names.get(theirs, theirs)
        if theirs != "rope_freqs.weight":
            found[name] = shape[::-1] if conv and len(shape) == 2 and ".h." in name else shape
    return raw, found, get, _tokenizer(meta, path)


def _tokenizer(meta: Mapping[str, Any], path: Path) -> Tokenizer | None:
    kind, tokens = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if not kind or not tokens:
        return None
    kinds, bos = list(meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)), -1
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = meta.get("tokenizer.ggml.bos_token_id", -1)
    try:
        if kind == "gpt2":
            cut = meta.get("tokenizer.ggml.pre", "default")
            if cut not in _CUTS:
                raise UserError(f"{path}: {unknown_name('pre-tokenizer', str(cut), list(_CUTS))}")
            control, whole = (
                [t for t, k in zip(tokens, kinds, strict=True) if k == wanted] for wanted in (3, 4)
            )
            ids = {token: i for i, token in enumerate(tokens)}
            data = byte_level_json(
                ids,
                meta["tokenizer.ggml.merges"],
                control=control,
                digits=_CUTS[cut][0],
                pattern=_CUTS[cut][1],
                bos=bos,
                whole=whole,
            )
        elif kind == "llama":
            data = pieces_json(tokens, meta["tokenizer.ggml.scores"], kinds, bos=bos)
        else:
            raise UserError(
                f"{path}: {unknown_name('GGUF vocabulary', str(kind), ['gpt2', 'llama'])}"
            )
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: its vocabulary is damaged: {str(error)[:150]}") from None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ):
        i = meta.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and 0 <= i < len(tokens):
            settings[name] = tokens[i]
    content = {
        "tokenizer.json": data,
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }
    if template := meta.get("tokenizer.chat_template"):
        content["chat_template.jinja"] = template.encode()
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return PretrainedTokenizer(content, list(dict.fromkeys(int(i) for i in ends if i is not None)))


def _described(c: ModelConfig, kind: str) -> Iterator[tuple[str, Any]]:
    """(key below the architecture, value) of the settings that `_config` reads."""
    yield from (
        ("block_count", c.layers),
        ("context_length", c.context),
        ("embedding_length", c.width),
        ("feed_forward_length", c.mlp_width),
    )
    yield "attention.head_count", c.heads
    if kind == "gpt2":
        yield "attention.layer_norm_epsilon", c.norm_eps
        return
    yield from (
        ("attention.head_count_kv", c.kv),
        ("attention.layer_norm_rms_epsilon", c.norm_eps),
        ("rope.freq_base", c.rope_theta),
    )
    yield from (
        ("attention.key_length", c.head_width),
        ("attention.value_length", c.head_width),
        ("rope.dimension_count", c.head_width),
    )
    yield "vocab_size", c.vocab_size
    if c.rope_scaling in ("linear", "yarn"):
        yield from (("rope.scaling.type", c.rope_scaling), ("rope.scaling.factor", c.rope_factor))
        yield "rope.scaling.original_context_length", c.rope_original_context


def _own_yarn(c: ModelConfig) -> bool:
    return c.rope_scaling == "yarn" and (
        c.rope_beta_fast,
        c.rope_beta_slow,
        c.rope_attention_factor,
    ) != (32.0, 1.0, 0.0)


def write_gguf(
    path: Path, c: ModelConfig, params: Any, tokenizer: Tokenizer | None, *, dtype: str, name: str
) -> None:
    """One GGUF file; tensors are made and written one by one. dtype: float32, float16 or q8_0 (matrices; vectors stay float32)."""
    gguf = _package()
    kind = huggingface.family_of(c)
    architecture = next((a for a, (theirs, _) in ARCHITECTURES.items() if theirs == kind), None)
    types = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    lost = {
        "a classification head": c.labels,
        "a sliding window": c.sliding_window,
        "exact GELU": kind == "gpt2" and c.mlp != "gelu",
        "YaRN's beta or attention factor": _own_yarn(c),
    }
    if any(lost.values()):
        raise UserError(
            f"a GGUF file does not carry {', '.join(name for name, there in lost.items() if there)}: use --format=hf"
        )
    if architecture is None:
        raise UserError(
            f"GGUF export knows {', '.join(ARCHITECTURES)}, not {kind}: use --format=hf"
        )
    if dtype not in types:
        raise UserError(f"--dtype={dtype}: GGUF files are written as {', '.join(types)}")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    for key, value in _described(c, kind):
        add = (
            writer.add_string
            if isinstance(value, str)
            else writer.add_float32
            if isinstance(value, float)
            else writer.add_uint32
        )
        add(f"{architecture}.{key}", value)
    if isinstance(tokenizer, PretrainedTokenizer):
        _write_vocabulary(writer, gguf, tokenizer, c.vocab_size)
    plan = []
    for theirs, shape, make in mapping.from_params(c, params):
        quantised = (
            types[dtype]
            if len(shape) > 1 and (dtype != "q8_0" or shape[-1] % 32 == 0)
            else types["float32"]
        )
        plan.append((theirs, shape, make, quantised))
        shape = shape[::-1] if kind == "gpt2" and len(shape) == 2 and ".h." in theirs else shape
        elements = int(np.prod(shape))
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        plain = {types["float32"]: np.float32, types["float16"]: np.float16}.get(
            quantised, np.uint8
        )
        stored = (
            shape if plain is not np.uint8 else gguf.quant_shape_to_byte_shape(shape, quantised)
        )
        raw = None if plain is not np.uint8 else quantised
        writer.add_tensor_info(
            _theirs(theirs, ARCHITECTURES[architecture][1]),
            stored,
            np.dtype(plain),
            elements // block * size,
            raw_dtype=raw,
        )
    if c.rope_scaling == "llama3":
        divisors = _divisors(c)
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, shape, make, quantised in plan:
        array = make().astype(np.float32, copy=False)
        if kind == "llama" and ("self_attn.q_proj" in theirs or "self_attn.k_proj" in theirs):
            array = _interleave(c, array, c.heads if "q_proj" in theirs else c.kv)
        array = array.T if kind == "gpt2" and len(shape) == 2 and ".h." in theirs else array
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(array), quantised))
    if c.rope_scaling == "llama3":
        writer.write_tensor_data(divisors)
    writer.close()


def _write_vocabulary(writer: Any, gguf: Any, tokenizer: PretrainedTokenizer, size: int) -> None:
    described = json.loads(tokenizer.files()["tokenizer.json"])
    if described["model"].get("type") != "BPE" or tokenizer.leading_space:
        raise UserError("GGUF export writes byte-level BPE vocabularies only: use --format=hf")
    cut = json.dumps(described.get("pre_tokenizer"))
    added = {t["id"]: t for t in described.get("added_tokens", [])}
    words = {i: token for token, i in described["model"]["vocab"].items()} | {
        i: t["content"] for i, t in added.items()
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(
        "smollm"
        if "Digits" in cut
        else "llama-bpe"
        if "{1,3}" in cut
        else "qwen2"
        if "Split" in cut
        else "gpt-2"
    )
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(size)])
    control = lambda i: (
        5 if i not in words else 1 if i not in added else 3 if added[i]["special"] else 4
    )
    writer.add_token_types([control(i) for i in range(size)])
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    )
    for add, stop in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
        tokenizer.stops,
        strict=False,
    ):
        add(stop)
    if tokenizer.prefix:
        writer.add_bos_token_id(tokenizer.prefix[0])
    writer.add_add_bos_token(bool(tokenizer.prefix))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
