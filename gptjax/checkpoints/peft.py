"""Adapters in PEFT's form and back: adapter_config.json and adapter_model.safetensors, by the tables of `gptjax.hf`.

Our layers hold q, k, v (and gate, up) in one kernel with one A. Written out, each of theirs gets that A and its own rows of B: the same function.
Read in, the A of each are stacked and B becomes block-diagonal, unless all are one A.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoints import huggingface, safetensors
from gptjax.checkpoints.tensor_map import TensorMap
from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig, ModelConfig
from gptjax.core import files, tree
from gptjax.core.files import decode
from gptjax.model import init as model_init
from gptjax.model import quantize

CONFIG, WEIGHTS, TEMPLATE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
)


_HEAD = "base_model."


_SCORE = f"{_HEAD}model.score.weight"


_PARTS_OF_DORA = "DoRA on some layers or parts of a layer only is not supported: our layers hold q, k, v (and gate, up) together"


def _layers(c: ModelConfig) -> Iterator[tuple[str, TensorMap, tuple[int, ...]]]:
    """(path of our layer, row of its kernel, shape of the kernel) of each that can have an adapter."""
    shapes = model_init.kernel_shapes(c)
    for row in huggingface.FAMILIES[huggingface.family_of(c)].rows(c):
        if row.ours.startswith("blocks/") and row.ours.endswith("/kernel"):
            yield row.ours.removesuffix("/kernel"), row, shapes[row.ours]


def _conv(c: ModelConfig) -> bool:
    """Whether the family keeps kernels as [in, out] (GPT-2's Conv1D), so that B comes out of the tables transposed."""
    return huggingface.family_of(c) == "gpt2"


def _parts(c: ModelConfig, row: TensorMap, b: np.ndarray, inputs: int) -> list[np.ndarray]:
    """Their B's [out, r] of our lora_b [r, *out] (of one layer): the table's own transform, with r in the place of the inputs."""
    found = row.dump(c, b.reshape(b.shape[0], *[1] * (inputs - 1), *b.shape[1:]))
    return [np.ascontiguousarray(part.T if _conv(c) else part) for part in found]


def write_adapter(
    folder: Path, c: ModelConfig, config: LoraConfig, trained: Any, base: str
) -> None:
    """The adapters as a folder that PEFT's `PeftModel.from_pretrained(base, folder)` reads. Raises UserError."""
    if config.rank and config.prompt_tokens:
        raise UserError(
            "PEFT keeps adapters and prompts in separate folders: train one of lora.rank and lora.prompt_tokens at a time to export it"
        )
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(trained).items()}
    tensors: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    for path, row, _ in _layers(c) if config.rank else ():
        if f"{path}/lora_a" not in flat:
            continue
        inputs = quantize.input_axes(path)
        for layer in range(c.layers):
            a, b = flat[f"{path}/lora_a"][layer], flat[f"{path}/lora_b"][layer]
            lengths = (
                _parts(c, row, flat[f"{path}/lora_m"][layer][None], inputs) if config.dora else []
            )
            for k, (theirs, part) in enumerate(
                zip(row.theirs, _parts(c, row, b, inputs), strict=True)
            ):
                name = f"{_HEAD}model.{theirs.format(layer).removesuffix('.weight')}"
                modules.add(name.rpartition(".")[2])
                tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(
                    a.reshape(-1, a.shape[-1]).T
                )
                tensors[f"{name}.lora_B.weight"] = part
                if lengths:
                    tensors[f"{name}.lora_magnitude_vector"] = lengths[k].reshape(-1)
    task: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "SEQ_CLS" if c.labels else "CAUSAL_LM",
        "inference_mode": True,
    }
    if config.rank:
        task |= {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": sorted(modules),
        }
        task |= {
            "bias": "none",
            "use_dora": config.dora,
            "fan_in_fan_out": _conv(c),
            "modules_to_save": ["score"] if c.labels else None,
        }
    else:
        tensors["prompt_embeddings"] = flat["embed/prompt"]
        task |= {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": config.prompt_tokens,
            "token_dim": c.width,
            "num_layers": c.layers,
        }
        task |= {"num_attention_heads": c.heads, "num_transformer_submodules": 1}
    if "score/kernel" in flat:
        tensors[_SCORE] = flat["score/kernel"]
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write_safetensors(
        folder / WEIGHTS,
        [(name, array.shape, tensors[name].copy) for name, array in tensors.items()],
        "float32",
    )
    files.write_text(folder / CONFIG, json.dumps(task, indent=1))


def read_adapter(folder: Path, c: ModelConfig) -> tuple[LoraConfig, Any]:
    """(config, adapters) of a PEFT folder for a model of this config. Raises UserError for kinds and tensors that do not fit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no PEFT adapter of {CONFIG} and {WEIGHTS}: {error}") from None
    kind = raw.get("peft_type")
    if kind == "PROMPT_TUNING":
        prompt = tensors.get("prompt_embeddings", np.zeros((0, 0), np.float32))
        if prompt.shape != (raw.get("num_virtual_tokens"), c.width):
            raise UserError(
                f"{folder}: prompt_embeddings are {prompt.shape} and the model's width is {c.width}"
            )
        head = (
            {"score": {"kernel": tensors[_SCORE].astype(np.float32)}} if _SCORE in tensors else {}
        )
        return LoraConfig(prompt_tokens=len(prompt)), {
            "embed": {"prompt": prompt.astype(np.float32)},
            **head,
        }
    if kind != "LORA" or raw.get("bias", "none") != "none":
        raise UserError(
            f"{folder}: peft_type = {kind!r}, bias = {raw.get('bias')!r} is not supported; LORA without biases and PROMPT_TUNING are"
        )
    flat: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for path, row, shape in _layers(c):
        found = _read_layer(c, raw, tensors, path, row, shape, used)
        flat |= {f"{path}/{leaf}": array for leaf, array in found.items()}
    if _SCORE in tensors:
        flat["score/kernel"] = tensors[_SCORE].astype(np.float32)
        used.add(_SCORE)
    if rest := sorted(set(tensors) - used):
        raise UserError(
            f"{folder}: {len(rest)} tensors fit no layer of this {huggingface.family_of(c)} model, such as {rest[0]} {list(tensors[rest[0]].shape)}"
        )
    rank = max(
        (array.shape[-1] for path, array in flat.items() if path.endswith("lora_a")), default=0
    )
    if not rank:
        raise UserError(f"{folder} holds no adapter for this model's layers")
    return LoraConfig(rank=rank, alpha=float(rank), dora=bool(raw.get("use_dora"))), tree.nested(
        flat
    )


def find(path: Path, c: ModelConfig) -> tuple[LoraConfig, Any, str]:
    """(config, adapters, chat template or "") of a run's workdir or of a PEFT folder. Raises UserError where they are not for this model."""
    if (path / CONFIG).is_file():
        template = path / TEMPLATE
        return *read_adapter(path, c), decode(
            template.read_bytes(), str(template)
        ) if template.is_file() else ""
    from gptjax.checkpoints.workdir import load_run  # orbax takes a second to import

    config, trained, tokenizer, _ = load_run(path)
    if not config.lora.on:
        raise UserError(f"{path} trained a whole model and no adapters: load it by itself")
    if (a := dataclasses.replace(config.model, **_FREE)) != (b := dataclasses.replace(c, **_FREE)):
        differ = [f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)]
        raise UserError(f"{path} adapts another model: {', '.join(differ)} differ")
    return config.lora, trained, tokenizer.chat_template


# What may differ between the model that adapters were trained on and the one they are put on.
_FREE: dict[str, Any] = dict(
    labels=(),
    dropout=0.0,
    dtype="float32",
    context=1,
    attention="xla",
    attention_block=1,
    scan_layers=False,
    remat="none",
    init_std=0.0,
)


def labels_of(path: Path, count: int) -> tuple[str, ...]:
    """Names of the classes of a run's head; PEFT's files keep none."""
    if (path / CONFIG).is_file():
        return tuple(f"LABEL_{i}" for i in range(count))
    return tuple(json.loads((path / "config.json").read_text(encoding="utf-8"))["model"]["labels"])


def _scale(raw: Mapping[str, Any], name: str, rank: int) -> float:
    """What a module's B A is multiplied by: alpha / r, or alpha / sqrt(r), with its own alpha where a pattern names one."""
    module = name.removeprefix(f"{_HEAD}model.")
    try:
        alpha = next(
            (
                v
                for key, v in (raw.get("alpha_pattern") or {}).items()
                if re.fullmatch(rf"(.*\.)?({key})", module)
            ),
            raw.get("lora_alpha", 8),
        )
    except re.error as error:
        raise UserError(
            f"{CONFIG}: alpha_pattern is no table of regular expressions: {error}"
        ) from None
    return alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def _read_layer(
    c: ModelConfig,
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    path: str,
    row: TensorMap,
    shape: tuple[int, ...],
    used: set[str],
) -> dict[str, np.ndarray]:
    """lora_a, lora_b (scaled) and lora_m of one of our layers, [L, ...]; nothing where the file has none of its parts."""
    inputs = quantize.input_axes(path)
    ins, outs = shape[:inputs], shape[inputs:]
    sizes = [part.shape[0] for part in _parts(c, row, np.zeros((1, *outs), np.float32), inputs)]
    each: list[dict[str, np.ndarray]] = []
    for layer in range(c.layers):
        names = [
            f"{_HEAD}model.{theirs.format(layer).removesuffix('.weight')}" for theirs in row.theirs
        ]
        pairs, lengths = [], []
        for k, name in enumerate(names):
            a, b = (tensors.get(f"{name}.lora_{x}.weight") for x in "AB")
            if a is None or b is None:
                continue
            if a.shape != (b.shape[1], math.prod(ins)) or b.shape[0] != sizes[k]:
                raise UserError(
                    f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a layer of {math.prod(ins)} to {sizes[k]}"
                )
            pairs.append(
                (k, a.astype(np.float32), b.astype(np.float32) * _scale(raw, name, len(a)))
            )
            used |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
            if (length := tensors.get(f"{name}.lora_magnitude_vector")) is not None:
                lengths.append(length.reshape(-1, 1).astype(np.float32))
                used.add(f"{name}.lora_magnitude_vector")
        each.append(_join(c, row, pairs, lengths, sizes, ins, outs, inputs))
    if not any(each):
        return {}
    rank = max(one["lora_a"].shape[-1] for one in each if one)
    empty = {
        "lora_a": np.zeros((*ins, rank), np.float32),
        "lora_b": np.zeros((rank, *outs), np.float32),
    }
    if any("lora_m" in one for one in each) and not all("lora_m" in one for one in each):
        raise UserError(_PARTS_OF_DORA)
    filled = [one or empty for one in each]
    return {leaf: np.stack([_grown(one[leaf], leaf, rank) for one in filled]) for leaf in filled[0]}


def _grown(array: np.ndarray, leaf: str, rank: int) -> np.ndarray:
    """With zeros up to the common rank."""
    if leaf == "lora_m":
        return array
    axis = array.ndim - 1 if leaf == "lora_a" else 0
    return np.pad(
        array, [(0, rank - array.shape[axis] if i == axis else 0) for i in range(array.ndim)]
    )


def _join(
    c: ModelConfig,
    row: TensorMap,
    pairs: list[tuple[int, np.ndarray, np.ndarray]],
    lengths: list[np.ndarray],
    sizes: list[int],
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    inputs: int,
) -> dict[str, np.ndarray]:
    """Our adapter of one layer from the (part, A [r, in], B [out, r]) of theirs; lengths: DoRA's magnitudes [out, 1] of every part."""
    if not pairs:
        return {}

    def ours(parts: dict[int, np.ndarray], rank: int) -> np.ndarray:
        whole = [parts.get(k, np.zeros((size, rank), np.float32)) for k, size in enumerate(sizes)]
        one = [1] * (inputs - 1)
        return row.load(c, (rank, *one, *outs), *(p.T if _conv(c) else p for p in whole)).reshape(
            rank, *outs
        )

    first = pairs[0][1]
    if all(np.array_equal(a, first) for _, a, _ in pairs):
        a_all, b_all = first, ours({k: b for k, _, b in pairs}, len(first))
    else:
        a_all = np.concatenate([a for _, a, _ in pairs])
        b_all = np.concatenate([ours({k: b}, len(a)) for k, a, b in pairs])
    found = {"lora_a": np.ascontiguousarray(a_all.T).reshape(*ins, -1), "lora_b": b_all}
    if lengths:
        if len(lengths) < len(sizes):
            raise UserError(_PARTS_OF_DORA)
        found["lora_m"] = ours(dict(enumerate(lengths)), 1)[0]
    return found
