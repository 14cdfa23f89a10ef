"""Adapters in PEFT's form and back: adapter_config.json and adapter_model.safetensors.

Our layers hold q, k, v (and gate, up) in one kernel with one A. Written out, each of PEFT's modules
gets our A and its own rows of B: the same function. `peft_read.py` reads, `peft_config.py` says
what becomes of each key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoints import huggingface, safetensors
from gptjax.checkpoints.mapping import WritableTensor
from gptjax.checkpoints.peft_config import CONFIG
from gptjax.checkpoints.peft_layers import PREFIX, SCORE, WEIGHTS, layers, split_outputs
from gptjax.checkpoints.peft_read import Adapter, read_adapter
from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig, ModelConfig
from gptjax.core import files, tree
from gptjax.core.files import decode
from gptjax.core.types import Params
from gptjax.tokenizer import template_files

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
        tensors[SCORE] = flat["score/kernel"]
    folder.mkdir(parents=True, exist_ok=True)
    writable = [WritableTensor(name, x.shape, x.copy) for name, x in tensors.items()]
    safetensors.write_safetensors(folder / WEIGHTS, writable, "float32")
    files.write_text(folder / CONFIG, json.dumps(task, indent=1))


def _lora_tensors(
    config: ModelConfig, settings: LoraConfig, flat: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """{name: array} of the adapters of all modules."""
    tensors: dict[str, np.ndarray] = {}
    for layer in layers(config):
        if f"{layer.path}/lora_a" not in flat:
            continue
        for number in range(config.layers):
            a = flat[f"{layer.path}/lora_a"][number]
            a = np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)  # [r, in]
            b_parts = split_outputs(config, layer, flat[f"{layer.path}/lora_b"][number])
            magnitudes = []
            if settings.dora:
                magnitude = flat[f"{layer.path}/lora_m"][number]
                magnitudes = split_outputs(config, layer, magnitude[None])
            for i, module in enumerate(layer.modules(number)):
                tensors[f"{PREFIX}{module}.lora_A.weight"] = a
                tensors[f"{PREFIX}{module}.lora_B.weight"] = b_parts[i]
                if magnitudes:
                    name = f"{PREFIX}{module}.lora_magnitude_vector"
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


# Adapters of either kind

# What may differ between the model that adapters were trained on and the one that gets them.
_MAY_DIFFER: dict[str, Any] = dict(
    labels=(),
    problem_type="",
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


def find(path: Path, config: ModelConfig, base: Callable[[], Params]) -> Adapter:
    """The adapter of a run's workdir or of a PEFT folder.

    base: gives the parameters of the model that gets it. Raises UserError where they are not for a
    model of this config.
    """
    if (path / CONFIG).is_file():
        adapter = read_adapter(path, config, base)
        file = path / template_files.FILE
        template = decode(file.read_bytes(), str(file)) if file.is_file() else ""
        return dataclasses.replace(adapter, chat_template=template)
    if inner := sorted(file.parent.name for file in path.glob(f"*/{CONFIG}")):
        raise UserError(
            f"{path} holds several adapters: name one of its folders {', '.join(inner)}"
        )
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
    return Adapter(
        run_config.lora,
        adapters,
        labels=run_config.model.labels,
        problem_type=run_config.model.problem_type,
        chat_template=tokenizer.chat_template,
    )
