"""TODO docstring."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints import gguf, huggingface, mapping, safetensors
from gptjax.config.errors import UserError
from gptjax.config.schema import Config, ModelConfig
from gptjax.core import files, tree
from gptjax.model import lora
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.pretrained import FILES, PretrainedTokenizer


@dataclasses.dataclass
class Pretrained:
    """What every checkpoint becomes. params: nested dict of host arrays, or `transfer.Stored` where they are yet to be read; dtype: the one that it
    was stored in; generation: what its generation_config.json says; keep: ids of special tokens from its config.json."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    dtype: str = "float32"
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_checkpoint(path: str | Path, *, dtype: str = "float32") -> Pretrained:
    """The checkpoint at `path`. dtype: of the parameters in memory; "" keeps the stored one. Raises UserError with one clear message."""
    found = open_checkpoint(path)
    if isinstance(found.params, safetensors.LazyParams):
        return dataclasses.replace(found, params=found.params.params(dtype))
    return (
        dataclasses.replace(found, params=jax.tree.map(lambda p: p.astype(dtype), found.params))
        if dtype
        else found
    )


def open_checkpoint(path: str | Path) -> Pretrained:
    """The checkpoint at `path`, its parameters yet to be read (`transfer.Stored`) unless it is a run. Raises UserError."""
    place = Path(path).expanduser()
    if not place.exists():
        return open_checkpoint(_from_hub(str(path)))
    try:
        with mapping.named(place):
            if place.suffix == ".gguf" or place.is_file():
                return _open_gguf(files.require_regular_file(place))
            if (place / "config.json").exists() and "model_type" in files.read_json(
                place / "config.json"
            ):
                return _open_hf(place)
            from gptjax.checkpoints.workdir import (
                load_run,
            )  # orbax takes a second to import, and only runs of our own need it

            config, params, tokenizer, base = load_run(place)
            if config.lora.on:
                return _with_adapter(config, params, tokenizer, base=base)
    except RecursionError:
        raise UserError(
            f"{place}: a JSON file in it is nested too deeply to be one of a checkpoint"
        ) from None
    return Pretrained(
        config.model, jax.tree.map(np.asarray, params), tokenizer, keep=_special_ids({}, tokenizer)
    )


_DIGEST = "sampled:"  # a run of before it is not compared


_HEADS = (
    "score",
    "head",
    "embed/positions",
    "embed/prompt",
)  # what a run may cut, replace or train on beside its adapters


def params_digest(params: Any) -> str:
    """A hash of every matrix that adapters may stand on: its path, its shape and up to 65,536 of its numbers, evenly spread."""
    result = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        if not path.startswith(_HEADS):
            sample = np.asarray(leaf).reshape(-1)[:: max(1, -(-leaf.size // 65536))]
            result.update(
                f"{path} {leaf.shape}".encode() + np.ascontiguousarray(sample, np.float32).tobytes()
            )
    return _DIGEST + result.hexdigest()


def _with_adapter(config: Config, trained: Any, tokenizer: Tokenizer, *, base: str) -> Pretrained:
    """A run's adapters merged into the checkpoint that they were trained on, whose digest was `base`; its tokenizer may know a chat template more."""
    found = read_checkpoint(config.train.init_from)
    if base.startswith(_DIGEST) and params_digest(found.params) != base:
        raise UserError(
            f"the adapters were trained on other weights than {config.train.init_from} holds now: restore the checkpoint that was there"
        )
    found.params.pop("score", None)
    if config.model.labels:
        found.params.pop("head", None)
    merged = jax.tree.map(np.asarray, lora.merge(config.lora, found.params, trained))
    changed = dataclasses.replace(
        found.config, labels=config.model.labels, dropout=config.model.dropout
    )
    return dataclasses.replace(
        found, config=changed, params=merged, tokenizer=tokenizer, dtype="float32"
    )


def _from_hub(name: str) -> Path:
    """A repository's name, where the hub package and a network exist."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or folder")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder; to fetch it from the Hugging Face hub, pip install 'gptjax[hub]'"
        ) from None
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # network, name, permission: whatever the package raises
        raise UserError(
            f"{name}: no such folder here, and the hub gave none: {str(error).splitlines()[0][:150]}"
        ) from None


def _open_gguf(path: Path) -> Pretrained:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is neither a folder nor a GGUF file")
    raw, found, get, tokenizer = gguf.read_gguf(path)
    c = huggingface.read_config(raw)
    _check_vocabulary(c, tokenizer)
    return Pretrained(
        c,
        safetensors.LazyParams(path, c, raw["model_type"], found, get),
        tokenizer,
        keep=_special_ids({}, tokenizer),
    )


def _open_hf(folder: Path) -> Pretrained:
    raw = files.read_json(folder / "config.json")
    c = huggingface.read_config(raw)
    generation = (
        files.read_json(folder / "generation_config.json")
        if (folder / "generation_config.json").exists()
        else {}
    )
    stops = generation.get("eos_token_id", raw.get("eos_token_id"))
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(i, int) for i in stops):
        raise UserError(f"{folder}: eos_token_id = {stops!r} holds what is no token id")
    for name in FILES:
        if (folder / name).exists():
            files.require_regular_file(folder / name)
    found, get, stored = safetensors.open_tensors(folder)
    params = safetensors.LazyParams(folder, c, raw["model_type"], found, get)
    try:
        tokenizer = PretrainedTokenizer.from_folder(folder, stops)
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}: a tokenizer file is no UTF-8: {error}") from None
    _check_vocabulary(c, tokenizer)
    return Pretrained(c, params, tokenizer, stored, generation, _special_ids(raw, tokenizer))


def _special_ids(raw: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    kept = {
        key: raw[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if raw.get(key) is not None
    }
    if "eos_token_id" not in kept and tokenizer:
        stops = list(tokenizer.ends)
        kept |= {
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            "bos_token_id": (tokenizer.prefix or (tokenizer.eot,))[0],
        }
    return kept


def _check_vocabulary(c: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer and tokenizer.vocab_size > c.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {c.vocab_size:,}: they do not belong together"
        )
