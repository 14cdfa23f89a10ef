"""Weights and folders that are none of ours to read, told by what is in them and refused by name.

`refuse_quantised` knows a quantised checkpoint by its config.json and by its tensors;
`refuse_other_folder` says what a folder holds instead of a checkpoint. To add a format, add a row
to `_SIGNS`, or to `_FOLDERS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.checkpoints.mapping import Shape
from gptjax.checkpoints.peft_config import CONFIG as ADAPTER_CONFIG
from gptjax.checkpoints.tensor_map import RawConfig
from gptjax.config.errors import UserError
from gptjax.core import files

# (names of tensors that no other format has, the format)
_SIGNS = (
    (r".*\.(qweight|qzeros)", "GPTQ or AWQ"),
    (r".*\.(weight_packed|weight_shape)", "compressed-tensors"),
    (r".*\.SCB", "bitsandbytes int8"),
    (r".*\.(nested_)?(absmax|quant_map|quant_state\..*)", "bitsandbytes in 4 bits"),
    (r".*\.weight_scale_inv", "fp8"),
    (r".*\.(weight_scale|weight_scale_2|weight_zero_point)", "fp8 or int8"),
    (r".*_blocks|.*\.weight_blocks", "MXFP4"),
    (r".*\.W_q", "HQQ"),
    (r".*\.(q_weight|q_scale|q_invperm|trellis)", "EXL2 or EXL3"),
    (r".*\.(codebooks|codes)", "AQLM"),
    (r".*\.(scales|biases)", "MLX"),
)

# Dtypes of a safetensors file that only quantised matrices have.
_KINDS = {
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "F8_E8M0": "MXFP4",
    "F4": "4 bits",
    "I8": "int8",
    "U8": "8 bits or less",
    "U32": "MLX",
}

# Where config.json says it: transformers, older compressed-tensors, MLX.
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")

_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "exl2": "EXL2",
    "bitsandbytes": "bitsandbytes",
}

# Side files in which older tools said it.
_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "Quanto",
}


def refuse_quantised(
    folder: Path, raw: RawConfig, shapes: Mapping[str, Shape], kinds: Mapping[str, str]
) -> None:
    """Raises UserError for a quantised checkpoint.

    raw: its config.json. shapes, kinds: of its tensors, by name; kinds are names of dtypes as in
    safetensors.
    """
    said_at = next((key for key in _CONFIG_KEYS if raw.get(key)), "")
    evidence, by_tensors = _tensor_sign(shapes, kinds)
    by_config = _method(raw[said_at]) if said_at else ""
    if not said_at and evidence:
        file = next((name for name in _FILES if (folder / name).exists()), "")
        by_config, said_at = (_FILES[file], file) if file else ("", "")
    if said_at and not evidence:
        raise UserError(
            f"config.json asks to quantise with {by_config} while loading ({said_at}), and the "
            f"weights in the file are not quantised:\nremove {said_at} from config.json to load "
            "them as they are"
        )
    if evidence:
        where = f"{said_at}; {evidence}" if said_at else evidence
        raise UserError(
            f"this checkpoint is quantised with {by_config or by_tensors} ({where}), which is not "
            "read here:\nuse the unquantised checkpoint that it was made of, or a GGUF of it"
        )


def _tensor_sign(shapes: Mapping[str, Shape], kinds: Mapping[str, str]) -> tuple[str, str]:
    """What tells that the tensors are quantised, and the format; empty for usual ones."""
    for pattern, name in _SIGNS:
        for tensor in shapes:
            if re.fullmatch(pattern, tensor):
                return f"the file has {tensor}", name
    for tensor, shape in shapes.items():
        if len(shape) > 1 and tensor.endswith("weight") and kinds.get(tensor) in _KINDS:
            return f"{tensor} is {kinds[tensor]}", _KINDS[kinds[tensor]]
    return "", ""


def _method(settings: Any) -> str:
    """The format's name in a `quantization_config`."""
    if not isinstance(settings, Mapping):
        return str(settings)[:40]
    method = str(settings.get("quant_method") or "")
    if not method and "group_size" in settings and "bits" in settings:
        return "MLX"
    if method == "bitsandbytes" or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        in_four = settings.get("load_in_4bit")
        kind = str(settings.get("bnb_4bit_quant_type", "nf4")) if in_four else "int8"
        return f"bitsandbytes {kind}"
    return _METHODS.get(method, method or "an unnamed method")


CONVERT = (
    "Convert it where you trust it: transformers' "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
)
_PICKLE = "holds {name}, a pickle, which can run code when it is read"
_PUT_ON_BASE = """Open the model that it was trained on, with it: \
--checkpoint={base} --adapter={folder}
In Python: gptjax.load("{base}").with_adapter("{folder}")"""
_NO_CONFIG = "has weights ({name}) and no config.json"
_ADD_CONFIG = "Put the config.json of the model next to them."

# (files, what a folder with them and no config.json is, a way out): the first that matches is said.
_FOLDERS = (
    (ADAPTER_CONFIG, "is a PEFT adapter: a change of a model, and no model", _PUT_ON_BASE),
    ("*.gguf", "is a folder with a GGUF file", "Name the file itself: {folder}/{name}"),
    ("model_index.json", "is a pipeline of diffusers", "Models of images are not read here."),
    (
        "params.json",
        "is in its authors' own format (params.json)",
        "Use the conversion of it that has a config.json with a model_type.",
    ),
    ("*.safetensors", _NO_CONFIG, _ADD_CONFIG),
    ("*.msgpack", _NO_CONFIG, _ADD_CONFIG),
    ("*.bin", _PICKLE, CONVERT),
    ("*.pt", _PICKLE, CONVERT),
    ("*.pth", _PICKLE, CONVERT),
    ("*.h5", "holds weights of TensorFlow ({name})", CONVERT),
    (
        "tokenizer*",
        "holds a tokenizer and no model",
        "The folder of a model has config.json and model.safetensors too.",
    ),
)


def refuse_other_folder(folder: Path) -> None:
    """Raises UserError for a folder that is known and is no checkpoint to open; else nothing."""
    if not folder.is_dir() or (folder / "checkpoints").is_dir() or (folder / "meta").is_dir():
        return  # a run's, whose reader says what is wrong
    if not any(folder.iterdir()):
        raise UserError(f"{folder} is an empty folder: name a workdir or a model's folder")
    for pattern, what, advice in _FOLDERS:
        if matches := sorted(folder.glob(pattern)):
            base = _base_of_adapter(matches[0]) if pattern == ADAPTER_CONFIG else ""
            words = {"folder": folder, "name": matches[0].name, "base": base}
            raise UserError(f"{{folder}} {what}.\n{advice}".format(**words))


def _base_of_adapter(path: Path) -> str:
    base = files.read_json(path).get("base_model_name_or_path")
    return str(base) if base else "BASE"
