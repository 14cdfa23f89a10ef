"""Any checkpoint, opened: a workdir, a Hugging Face folder or name, or a GGUF file.

`open_checkpoint` reads what is small and leaves the weights in their files; `read_checkpoint` reads
all. Both give a `Pretrained`, the only form that the rest of the package sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints import (
    foreign_weights,
    generation_config,
    gguf,
    huggingface,
    mapping,
    peft_config,
    safetensors,
)
from gptjax.config.errors import UserError
from gptjax.config.schema import Config, ModelConfig
from gptjax.core import cli, files, tree
from gptjax.model import lora
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.pretrained import FILES, PretrainedTokenizer


@dataclasses.dataclass
class Pretrained:
    """What every checkpoint becomes.

    params: nested dict of host arrays, or `safetensors.LazyParams` where they are yet to be read.
    dtype: the one that they are stored in.
    generation: what its generation_config.json says.
    keep: ids of special tokens from its config.json, which an export writes again.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    dtype: str = "float32"
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_checkpoint(path: str | Path, *, dtype: str = "float32") -> Pretrained:
    """The checkpoint at `path`, its parameters in memory in `dtype` ("" keeps the stored one).

    Raises UserError with one clear message that names the checkpoint.
    """
    checkpoint = open_checkpoint(path)
    params = checkpoint.params
    if isinstance(params, safetensors.LazyParams):
        params = params.params(dtype)
    elif dtype:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    return dataclasses.replace(checkpoint, params=params)


def open_checkpoint(path: str | Path) -> Pretrained:
    """The checkpoint at `path`, its parameters yet to be read unless it is a run.

    path: a workdir, a step's folder in it, a Hugging Face folder or repository, or a GGUF file.
    Raises UserError.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return open_checkpoint(_download(str(path)))
    try:
        with mapping.naming(place):
            if place.suffix == ".gguf" or place.is_file():
                return _open_gguf(files.require_regular_file(place))
            config_file = place / "config.json"
            raw = files.read_json(config_file) if config_file.exists() else {}
            if "model_type" in raw:
                return _open_hf(place)
            if raw and "model" not in raw:
                raise UserError(_no_model_type(raw))
            if not raw:
                foreign_weights.refuse_other_folder(place)
            return _open_run(place)
    except RecursionError:
        raise UserError(
            f"{place}: a JSON file in it is nested too deeply to be one of a checkpoint"
        ) from None


def open_for_generation(path: str | Path) -> Pretrained:
    """`open_checkpoint`, and a line on stderr of what it suggests for generating texts.

    That is not taken over: a call's own options, or the defaults, always hold.
    """
    checkpoint = open_checkpoint(path)
    if suggested := generation_config.suggestions(checkpoint.generation):
        cli.say(
            f"note: {path} suggests {', '.join(suggested)} for generating text; this is not taken "
            "over: give it as options where you want it"
        )
    return checkpoint


def _no_model_type(raw: Mapping[str, Any]) -> str:
    """What to say of a config.json that is neither a run's nor names its architecture."""
    classes = raw.get("architectures") or []
    known = ", ".join(huggingface.FAMILIES)
    for family in huggingface.FAMILIES.values():
        if family.architecture in classes:
            return (
                f'config.json has no model_type: add "model_type": "{family.model_type}", '
                f"which is that of {family.architecture}"
            )
    return f"config.json has no model_type, which says what model this is; known: {known}"


def _open_run(path: Path) -> Pretrained:
    # orbax takes a second to import, and only runs of our own need it
    from gptjax.checkpoints.workdir import load_run

    run = load_run(path)
    if run.config.lora.on:
        return _with_adapter(run.config, run.params, run.tokenizer, base=run.base)
    params = jax.tree.map(np.asarray, run.params)
    return Pretrained(run.config.model, params, run.tokenizer, keep=_special_ids({}, run.tokenizer))


# Begins a digest. Early runs stored none, or another kind: those are not compared.
_DIGEST = "sampled:"

# What a run with adapters may cut, replace or train too: no adapter multiplies these.
_TRAINED_WITH_ADAPTERS = ("score", "head", "embed/positions", "embed/prompt")


def params_digest(params: Any) -> str:
    """A hash of every matrix that adapters may be trained on.

    Of each: its path, its shape and up to 65,536 of its numbers, evenly spread.
    """
    result = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        if path.startswith(_TRAINED_WITH_ADAPTERS):
            continue
        stride = max(1, -(-leaf.size // 65536))
        sample = np.ascontiguousarray(np.asarray(leaf).reshape(-1)[::stride], np.float32)
        result.update(f"{path} {leaf.shape}".encode() + sample.tobytes())
    return _DIGEST + result.hexdigest()


def _with_adapter(config: Config, trained: Any, tokenizer: Tokenizer, *, base: str) -> Pretrained:
    """A run's adapters, merged into the checkpoint that they were trained on.

    base: that checkpoint's `params_digest`. The run's tokenizer may have one chat template more.
    """
    checkpoint = read_checkpoint(config.train.init_from)
    if base.startswith(_DIGEST) and params_digest(checkpoint.params) != base:
        raise UserError(
            f"the adapters were trained on other weights than {config.train.init_from} "
            "holds now: restore the checkpoint that was there"
        )
    checkpoint.params.pop("score", None)
    if config.model.labels:
        checkpoint.params.pop("head", None)
    merged = jax.tree.map(np.asarray, lora.merge(config.lora, checkpoint.params, trained))
    changed = dataclasses.replace(
        checkpoint.config,
        labels=config.model.labels,
        problem_type=config.model.problem_type,
        dropout=config.model.dropout,
    )
    return dataclasses.replace(
        checkpoint, config=changed, params=merged, tokenizer=tokenizer, dtype="float32"
    )


def _download(name: str) -> Path:
    """The folder of a Hugging Face repository, where the hub's package and a network exist."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or folder")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder; to fetch it from the Hugging Face hub, "
            "pip install 'gptjax[hub]'"
        ) from None
    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, name, permission: whatever the package raises
        reason = str(error).splitlines()[0][:150]
        raise UserError(f"{name}: no such folder here, and the hub gave none: {reason}") from None


def _open_gguf(path: Path) -> Pretrained:
    contents = gguf.read_gguf(path)
    _check_vocabulary(contents.config, contents.tokenizer)
    params = safetensors.LazyParams(path, contents.config, contents.family, contents.tensors)
    keep = {**_special_ids({}, contents.tokenizer), **contents.special_ids}
    return Pretrained(
        contents.config, params, contents.tokenizer, generation=contents.generation, keep=keep
    )


def _open_hf(folder: Path) -> Pretrained:
    raw = files.read_json(folder / "config.json")
    family = huggingface.family_named(raw["model_type"])
    if (folder / peft_config.CONFIG).exists() and not any(folder.glob("model*.safetensors")):
        foreign_weights.refuse_other_folder(folder)  # some trainers put the base's config there
    tensors = safetensors.open_tensors(folder)
    foreign_weights.refuse_quantised(folder, raw, tensors.shapes, tensors.kinds)
    config = huggingface.read_config(raw)
    generation = generation_config.read_generation_config(folder, raw)
    eos_ids = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos_ids is None:
        eos_ids = []
    elif not isinstance(eos_ids, list):
        eos_ids = [eos_ids]
    if not all(isinstance(i, int) for i in eos_ids):
        raise UserError(f"{folder}: eos_token_id = {eos_ids!r} holds what is no token id")
    for name in FILES:
        if (folder / name).exists():
            files.require_regular_file(folder / name)
    config, tensors = safetensors.with_own_head(config, family, tensors)
    try:
        params = safetensors.LazyParams(folder, config, family, tensors)
    except UserError as error:
        taken = {key: value for key, value in family.defaults.items() if key not in raw}
        sizes = [f"{key} ({taken[key]})" for key in _SIZES if key in taken]
        if not sizes:
            raise
        note = f"config.json has no {', '.join(sizes)}: that is what transformers takes"
        raise UserError(f"{error}\n({note})") from None
    try:
        tokenizer = PretrainedTokenizer.from_folder(folder, eos_ids)
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}: a tokenizer file is no UTF-8: {error}") from None
    _check_vocabulary(config, tokenizer)
    keep = _special_ids(raw, tokenizer)
    return Pretrained(config, params, tokenizer, tensors.dtype, generation, keep)


# Settings without which no config.json is complete, as families name them.
_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "n_layer", "n_embd", "n_head", "n_positions"),
)


def _special_ids(raw: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Ids of special tokens in config.json, or the tokenizer's where that names no end of text."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: raw[name] for name in names if raw.get(name) is not None}
    if "eos_token_id" not in ids and tokenizer:
        eos_ids = list(tokenizer.eos_ids)
        ids["eos_token_id"] = eos_ids if len(eos_ids) > 1 else eos_ids[0]
        ids["bos_token_id"] = (tokenizer.bos_ids or (tokenizer.eot,))[0]
    return ids


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        tokenizer.restrict(config.vocab_size)
