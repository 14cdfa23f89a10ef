"""Adapters in PEFT's form and back: adapter_config.json and adapter_model.safetensors.

Our layers hold q, k, v (and gate, up) in one kernel with one A; PEFT has an A and a B for each of
these modules. Written out, each module gets our A and its own rows of B: the same function. Read
in, the A's of the modules are stacked and B becomes block-diagonal, unless all have one A.

The maps of a family (`tensor_map.py`) know which outputs of a kernel are which module's. They see
B [r, out] as a kernel with r inputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.checkpoints import huggingface, safetensors
from gptjax.checkpoints.mapping import Shape, WritableTensor
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig, ModelConfig
from gptjax.core import files, tree
from gptjax.core.files import decode
from gptjax.model import init as model_init
from gptjax.model import quantize

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TEMPLATE = "chat_template.jinja"

# Begins the names of all tensors.
_PREFIX = "base_model.model."

_SCORE = f"{_PREFIX}score.weight"

_PARTIAL_DORA = (
    "DoRA on some layers or parts of a layer only is not supported: "
    "our layers hold q, k, v (and gate, up) together"
)


class _Layer(NamedTuple):
    """One of our layers that can have an adapter, in each block.

    path: of the layer, such as `blocks/attn/qkv`. tensor_map: of its kernel. in_shape, out_shape:
    the kernel's axes.
    """

    path: str
    tensor_map: TensorMap
    in_shape: Shape
    out_shape: Shape

    def modules(self, number: int) -> list[str]:
        """Names of PEFT's modules in block `number`, without the prefix."""
        return [n.format(number).removesuffix(".weight") for n in self.tensor_map.hf_names]


def _layers(config: ModelConfig) -> Iterator[_Layer]:
    shapes = model_init.kernel_shapes(config)
    for tensor_map in huggingface.family_of(config).tensor_maps(config):
        path, _, leaf = tensor_map.param_path.rpartition("/")
        if tensor_map.in_blocks and leaf == "kernel":
            shape, inputs = shapes[tensor_map.param_path], quantize.input_axes(path)
            yield _Layer(path, tensor_map, shape[:inputs], shape[inputs:])


def _split_outputs(config: ModelConfig, layer: _Layer, b: np.ndarray) -> list[np.ndarray]:
    """The B [out, r] of each module, of our lora_b [r, *out_shape] of one block."""
    in_shape = (len(b), *[1] * (len(layer.in_shape) - 1))
    parts = layer.tensor_map.to_hf(config, b.reshape(*in_shape, *layer.out_shape))
    in_out = huggingface.family_of(config).kernels_in_out
    return [np.ascontiguousarray(part.T if in_out else part) for part in parts]


def _join_outputs(config: ModelConfig, layer: _Layer, parts: list[np.ndarray]) -> np.ndarray:
    """lora_b [r, *out_shape] of the modules' B [out, r]: what `_split_outputs` takes apart."""
    rank = parts[0].shape[1]
    in_out = huggingface.family_of(config).kernels_in_out
    tensors = [part.T if in_out else part for part in parts]
    shape = (rank, *[1] * (len(layer.in_shape) - 1), *layer.out_shape)
    return layer.tensor_map.from_hf(config, shape, *tensors).reshape(rank, *layer.out_shape)


# Writing


def write_adapter(
    folder: Path, config: ModelConfig, settings: LoraConfig, adapters: Any, base: str
) -> None:
    """Writes a folder that PEFT's `PeftModel.from_pretrained(base_model, folder)` reads.

    adapters: as `lora.init` makes them. base: the checkpoint that they were trained on. Raises
    UserError.
    """
    if settings.rank and settings.prompt_tokens:
        raise UserError(
            "PEFT keeps adapters and prompts in separate folders: "
            "train one of lora.rank and lora.prompt_tokens at a time to export it"
        )
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(adapters).items()}
    if settings.rank:
        tensors = _lora_tensors(config, settings, flat)
        described = _describe_lora(config, settings, tensors)
    else:
        tensors = {"prompt_embeddings": flat["embed/prompt"]}
        described = {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": settings.prompt_tokens,
            "token_dim": config.width,
            "num_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_transformer_submodules": 1,
        }
    task = {
        "base_model_name_or_path": base,
        "task_type": "SEQ_CLS" if config.labels else "CAUSAL_LM",
        "inference_mode": True,
        **described,
    }
    if "score/kernel" in flat:
        tensors[_SCORE] = flat["score/kernel"]
    folder.mkdir(parents=True, exist_ok=True)
    writable = [WritableTensor(name, x.shape, x.copy) for name, x in tensors.items()]
    safetensors.write_safetensors(folder / WEIGHTS, writable, "float32")
    files.write_text(folder / CONFIG, json.dumps(task, indent=1))


def _lora_tensors(
    config: ModelConfig, settings: LoraConfig, flat: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """{name: array} of the adapters of all modules."""
    tensors: dict[str, np.ndarray] = {}
    for layer in _layers(config):
        if f"{layer.path}/lora_a" not in flat:
            continue
        for number in range(config.layers):
            a = flat[f"{layer.path}/lora_a"][number]
            a = np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)  # [r, in]
            b_parts = _split_outputs(config, layer, flat[f"{layer.path}/lora_b"][number])
            magnitudes = []
            if settings.dora:
                magnitude = flat[f"{layer.path}/lora_m"][number]
                magnitudes = _split_outputs(config, layer, magnitude[None])
            for i, module in enumerate(layer.modules(number)):
                tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
                tensors[f"{_PREFIX}{module}.lora_B.weight"] = b_parts[i]
                if magnitudes:
                    name = f"{_PREFIX}{module}.lora_magnitude_vector"
                    tensors[name] = magnitudes[i].reshape(-1)
    return tensors


def _describe_lora(
    config: ModelConfig, settings: LoraConfig, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a LORA adapter in adapter_config.json."""
    modules = {name.split(".")[-3] for name in tensors if name.endswith(".lora_A.weight")}
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "use_dora": settings.dora,
        "fan_in_fan_out": huggingface.family_of(config).kernels_in_out,
        "modules_to_save": ["score"] if config.labels else None,
    }


# Reading


class _AdapterFile:
    """A PEFT folder: its config, and tensors that are taken one by one, so that none is ignored."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            self.config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            self._tensors = dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} is no PEFT adapter of {CONFIG} and {WEIGHTS}: {error}"
            ) from None

    def look(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def take(self, name: str) -> np.ndarray | None:
        """The tensor in float32, or None."""
        tensor = self._tensors.pop(name, None)
        return None if tensor is None else tensor.astype(np.float32)

    @property
    def rest(self) -> dict[str, np.ndarray]:
        """What was not taken."""
        return self._tensors


def read_adapter(folder: Path, config: ModelConfig) -> tuple[LoraConfig, Any]:
    """(settings, adapters) of a PEFT folder for a model of this config.

    The scale alpha / r is in lora_b already: the settings' alpha is their rank. Raises UserError
    for kinds of adapters and for tensors that do not fit.
    """
    file = _AdapterFile(folder)
    kind, bias = file.config.get("peft_type"), file.config.get("bias", "none")
    if kind == "PROMPT_TUNING":
        return _read_prompt(folder, config, file)
    if kind != "LORA" or bias != "none":
        raise UserError(
            f"{folder}: peft_type = {kind!r}, bias = {file.config.get('bias')!r} is not supported; "
            "LORA without biases and PROMPT_TUNING are"
        )
    flat: dict[str, np.ndarray] = {}
    for layer in _layers(config):
        for leaf, array in _read_layer(config, file, layer).items():
            flat[f"{layer.path}/{leaf}"] = array
    score = file.take(_SCORE)
    if score is not None:
        flat["score/kernel"] = score
    if rest := sorted(file.rest):
        model_type = huggingface.family_of(config).model_type
        raise UserError(
            f"{folder}: {len(rest)} tensors fit no layer of this {model_type} model, "
            f"such as {rest[0]} {list(file.rest[rest[0]].shape)}"
        )
    ranks = [array.shape[-1] for path, array in flat.items() if path.endswith("lora_a")]
    if not ranks:
        raise UserError(f"{folder} holds no adapter for this model's layers")
    rank, dora = max(ranks), bool(file.config.get("use_dora"))
    return LoraConfig(rank=rank, alpha=float(rank), dora=dora), tree.nested(flat)


def _read_prompt(folder: Path, config: ModelConfig, file: _AdapterFile) -> tuple[LoraConfig, Any]:
    prompt = file.take("prompt_embeddings")
    shape = (0, 0) if prompt is None else prompt.shape
    if prompt is None or shape != (file.config.get("num_virtual_tokens"), config.width):
        raise UserError(
            f"{folder}: prompt_embeddings are {shape} and the model's width is {config.width}"
        )
    adapters: dict[str, Any] = {"embed": {"prompt": prompt}}
    score = file.take(_SCORE)
    if score is not None:
        adapters["score"] = {"kernel": score}
    return LoraConfig(prompt_tokens=len(prompt)), adapters


class _ModuleAdapter(NamedTuple):
    """PEFT's adapter of one module. a [r, in]; b [out, r], scaled; magnitude [out, 1] with DoRA."""

    number: int  # of the module among those of our layer
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


def _read_layer(config: ModelConfig, file: _AdapterFile, layer: _Layer) -> dict[str, np.ndarray]:
    """lora_a, lora_b (scaled) and lora_m of one of our layers, [L, ...]; empty without an adapter.

    Blocks may have other ranks, or none: lower ones are filled up with zeros.
    """
    nothing = np.zeros((1, *layer.out_shape), np.float32)
    sizes = [len(part) for part in _split_outputs(config, layer, nothing)]
    blocks = []
    for number in range(config.layers):
        modules = []
        for index, name in enumerate(layer.modules(number)):
            module = _read_module(file, index, name, math.prod(layer.in_shape), sizes[index])
            if module is not None:
                modules.append(module)
        blocks.append(_join_modules(config, layer, modules, sizes))
    if not any(blocks):
        return {}
    with_dora = ["lora_m" in block for block in blocks]
    if any(with_dora) and not all(with_dora):
        raise UserError(_PARTIAL_DORA)
    rank = max(block["lora_a"].shape[-1] for block in blocks if block)
    no_adapter = {
        "lora_a": np.zeros((*layer.in_shape, 0), np.float32),
        "lora_b": np.zeros((0, *layer.out_shape), np.float32),
    }
    padded = [_pad_rank(block or no_adapter, rank) for block in blocks]
    return {leaf: np.stack([block[leaf] for block in padded]) for leaf in padded[0]}


def _read_module(
    file: _AdapterFile, number: int, name: str, in_size: int, out_size: int
) -> _ModuleAdapter | None:
    """The adapter of the module `name`, or None where the file has none. Raises UserError."""
    a_name, b_name = (f"{_PREFIX}{name}.lora_{x}.weight" for x in "AB")
    if file.look(a_name) is None or file.look(b_name) is None:
        return None
    a, b = file.take(a_name), file.take(b_name)
    assert a is not None and b is not None  # they were there a line ago
    if a.shape != (b.shape[1], in_size) or b.shape[0] != out_size:
        raise UserError(
            f"{_PREFIX}{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} "
            f"do not fit a layer of {in_size} to {out_size}"
        )
    magnitude = file.take(f"{_PREFIX}{name}.lora_magnitude_vector")
    if magnitude is not None:
        magnitude = magnitude.reshape(-1, 1)
    return _ModuleAdapter(number, a, b * _scale(file.config, name, len(a)), magnitude)


def _scale(peft_config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A of a module is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised).

    A module has its own alpha where `alpha_pattern` names one.
    """
    alpha = peft_config.get("lora_alpha", 8)
    for pattern, own_alpha in (peft_config.get("alpha_pattern") or {}).items():
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise UserError(
                f"{CONFIG}: alpha_pattern is no table of regular expressions: {error}"
            ) from None
        if matches:
            alpha = own_alpha
            break
    return alpha / (math.sqrt(rank) if peft_config.get("use_rslora") else rank)


def _join_modules(
    config: ModelConfig, layer: _Layer, modules: list[_ModuleAdapter], sizes: list[int]
) -> dict[str, np.ndarray]:
    """Our adapter of one block's layer, of those of its modules; empty without any.

    sizes: outputs of every module, also of those without an adapter.
    """
    if not modules:
        return {}

    def outputs(with_b: list[_ModuleAdapter]) -> np.ndarray:
        """lora_b with the rows of these modules, and zeros elsewhere."""
        rank = with_b[0].b.shape[1]
        parts = [np.zeros((size, rank), np.float32) for size in sizes]
        for module in with_b:
            parts[module.number] = module.b
        return _join_outputs(config, layer, parts)

    first = modules[0].a
    if all(np.array_equal(module.a, first) for module in modules):
        a, lora_b = first, outputs(modules)
    else:  # block-diagonal: each module's rows use its own A
        a = np.concatenate([module.a for module in modules])
        lora_b = np.concatenate([outputs([module]) for module in modules])
    joined = {"lora_a": np.ascontiguousarray(a.T).reshape(*layer.in_shape, -1), "lora_b": lora_b}
    magnitudes = [module.magnitude for module in modules if module.magnitude is not None]
    if magnitudes:
        if len(magnitudes) < len(sizes):
            raise UserError(_PARTIAL_DORA)
        joined["lora_m"] = _join_outputs(config, layer, magnitudes)[0]
    return joined


def _pad_rank(adapter: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The adapter with zeros up to a common rank."""
    a, b = adapter["lora_a"], adapter["lora_b"]
    missing = rank - len(b)
    return {
        **adapter,
        "lora_a": np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]),
        "lora_b": np.pad(b, [(0, missing)] + [(0, 0)] * (b.ndim - 1)),
    }


# Adapters of either kind

# What may differ between the model that adapters were trained on and the one that gets them.
_MAY_DIFFER: dict[str, Any] = dict(
    labels=(),
    dropout=0.0,
    dtype="float32",
    context=1,
    attention="xla",
    attention_block=1,
    scan_layers=False,
    remat="none",
    init_std=0.0,
    implementation="auto",
    family="",
)


def find(path: Path, config: ModelConfig) -> tuple[LoraConfig, Any, str]:
    """(settings, adapters, chat template or "") of a run's workdir or of a PEFT folder.

    Raises UserError where they are not for a model of this config.
    """
    if (path / CONFIG).is_file():
        settings, adapters = read_adapter(path, config)
        file = path / TEMPLATE
        template = decode(file.read_bytes(), str(file)) if file.is_file() else ""
        return settings, adapters, template
    from gptjax.checkpoints.workdir import load_run  # orbax takes a second to import

    run_config, adapters, tokenizer, _ = load_run(path)
    if not run_config.lora.on:
        raise UserError(f"{path} trained all weights and no adapters: load it by itself")
    trained_on = dataclasses.replace(run_config.model, **_MAY_DIFFER)
    adapted = dataclasses.replace(config, **_MAY_DIFFER)
    if trained_on != adapted:
        names = [field.name for field in dataclasses.fields(adapted)]
        different = [name for name in names if getattr(trained_on, name) != getattr(adapted, name)]
        raise UserError(f"{path} adapts another model: {', '.join(different)} differ")
    return run_config.lora, adapters, tokenizer.chat_template


def labels_of(path: Path, count: int) -> tuple[str, ...]:
    """Names of the classes of a run's head; PEFT's files have none."""
    if (path / CONFIG).is_file():
        return tuple(f"LABEL_{i}" for i in range(count))
    return tuple(json.loads((path / "config.json").read_text(encoding="utf-8"))["model"]["labels"])
