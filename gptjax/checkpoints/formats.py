"""Checkpoints in and out: a workdir, a Hugging Face folder or a GGUF file, read into one form and written as any of them.

    python -m gptjax.convert --from=PATH --to=PATH [--format=hf|gguf|gptjax|peft] [--dtype=float32|bfloat16|float16|q8_0]

What was written is read again, and its logits are compared with the original's before success is reported. Tensors are written one
by one, so memory holds the model once. --dtype defaults to the one that the checkpoint is stored in.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import cli, files, gguf, hf, lora, metrics, model, transfer, tree
from gptjax import config as config_lib
from gptjax.config import Config, ModelConfig, UserError
from gptjax.tokenizer import OpenAITokenizer, PretrainedTokenizer, Tokenizer
from gptjax.tokenizer.pretrained import FILES, of_gpt2

SHARD_BYTES = 5 << 30
FORMATS = ("hf", "gguf", "gptjax")


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


def read(path: str | Path, *, dtype: str = "float32") -> Pretrained:
    """The checkpoint at `path`. dtype: of the parameters in memory; "" keeps the stored one. Raises UserError with one clear message."""
    found = opened(path)
    if isinstance(found.params, transfer.Stored):
        return dataclasses.replace(found, params=found.params.params(dtype))
    return dataclasses.replace(found, params=jax.tree.map(lambda p: p.astype(dtype), found.params)) if dtype else found


def opened(path: str | Path) -> Pretrained:
    """The checkpoint at `path`, its parameters yet to be read (`transfer.Stored`) unless it is a run. Raises UserError."""
    place = Path(path).expanduser()
    if not place.exists():
        return opened(_from_hub(str(path)))
    try:
        with transfer.named(place):
            if place.suffix == ".gguf" or place.is_file():
                return _open_gguf(files.regular(place))
            if (place / "config.json").exists() and "model_type" in files.read_json(place / "config.json"):
                return _open_hf(place)
            from gptjax import checkpoint  # orbax takes a second to import, and only runs of our own need it

            config, params, tokenizer, base = checkpoint.load_run(place)
            if config.lora.on:
                return _adapted(config, params, tokenizer, base=base)
    except RecursionError:
        raise UserError(f"{place}: a JSON file in it is nested too deeply to be one of a checkpoint") from None
    return Pretrained(config.model, jax.tree.map(np.asarray, params), tokenizer, keep=_special_ids({}, tokenizer))


_DIGEST = "sampled:"  # a run of before it is not compared
_HEADS = ("score", "head", "embed/positions", "embed/prompt")  # what a run may cut, replace or train on beside its adapters


def digest(params: Any) -> str:
    """A hash of every matrix that adapters may stand on: its path, its shape and up to 65,536 of its numbers, evenly spread."""
    result = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        if not path.startswith(_HEADS):
            sample = np.asarray(leaf).reshape(-1)[:: max(1, -(-leaf.size // 65536))]
            result.update(f"{path} {leaf.shape}".encode() + np.ascontiguousarray(sample, np.float32).tobytes())
    return _DIGEST + result.hexdigest()


def _adapted(config: Config, trained: Any, tokenizer: Tokenizer, *, base: str) -> Pretrained:
    """A run's adapters merged into the checkpoint that they were trained on, whose digest was `base`; its tokenizer may know a chat template more."""
    found = read(config.train.init_from)
    if base.startswith(_DIGEST) and digest(found.params) != base:
        raise UserError(f"the adapters were trained on other weights than {config.train.init_from} holds now: restore the checkpoint that was there")
    found.params.pop("score", None)
    if config.model.labels:
        found.params.pop("head", None)
    merged = jax.tree.map(np.asarray, lora.merge(config.lora, found.params, trained))
    changed = dataclasses.replace(found.config, labels=config.model.labels, dropout=config.model.dropout)
    return dataclasses.replace(found, config=changed, params=merged, tokenizer=tokenizer, dtype="float32")


def _from_hub(name: str) -> Path:
    """A repository's name, where the hub package and a network exist."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or folder")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name}: no such folder; to fetch it from the Hugging Face hub, pip install 'gptjax[hub]'") from None
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # network, name, permission: whatever the package raises
        raise UserError(f"{name}: no such folder here, and the hub gave none: {str(error).splitlines()[0][:150]}") from None


def _open_gguf(path: Path) -> Pretrained:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is neither a folder nor a GGUF file")
    raw, found, get, tokenizer = gguf.read(path)
    c = hf.read_config(raw)
    _check_vocabulary(c, tokenizer)
    return Pretrained(c, transfer.Stored(path, c, raw["model_type"], found, get), tokenizer, keep=_special_ids({}, tokenizer))


def _open_hf(folder: Path) -> Pretrained:
    raw = files.read_json(folder / "config.json")
    c = hf.read_config(raw)
    generation = files.read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    stops = generation.get("eos_token_id", raw.get("eos_token_id"))
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(i, int) for i in stops):
        raise UserError(f"{folder}: eos_token_id = {stops!r} holds what is no token id")
    for name in FILES:
        if (folder / name).exists():
            files.regular(folder / name)
    found, get, stored = transfer.open_tensors(folder)
    params = transfer.Stored(folder, c, raw["model_type"], found, get)
    try:
        tokenizer = PretrainedTokenizer.from_folder(folder, stops)
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}: a tokenizer file is no UTF-8: {error}") from None
    _check_vocabulary(c, tokenizer)
    return Pretrained(c, params, tokenizer, stored, generation, _special_ids(raw, tokenizer))


def _special_ids(raw: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    kept = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    if "eos_token_id" not in kept and tokenizer:
        stops = list(tokenizer.ends)
        kept |= {"eos_token_id": stops if len(stops) > 1 else stops[0], "bos_token_id": (tokenizer.prefix or (tokenizer.eot,))[0]}
    return kept


def _check_vocabulary(c: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer and tokenizer.vocab_size > c.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {c.vocab_size:,}: they do not belong together")


def write(path: Path, checkpoint: Pretrained, *, form: str = "hf", dtype: str = "", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the checkpoint as a Hugging Face folder, a GGUF file or a workdir. `path` must not exist. Raises UserError."""
    if form not in FORMATS:
        raise UserError(config_lib.unknown_name("format", form, list(FORMATS)))
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} exists already: name a new place")
    dtype = dtype or default_dtype(checkpoint, form)
    temporary = path.parent / f".{path.name}.writing"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.unlink(missing_ok=True)
    try:
        if form == "gguf":
            gguf.write(temporary, checkpoint.config, checkpoint.params, _exportable(checkpoint.tokenizer), dtype=dtype, name=path.stem)
        elif form == "hf":
            _write_hf(temporary, checkpoint, dtype, shard_bytes, path.name)
        else:
            _write_workdir(temporary, checkpoint, dtype)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def default_dtype(checkpoint: Pretrained, form: str) -> str:
    """As stored, where the format has it: a workdir is float32, and so is a GGUF file of bfloat16, which float16 cannot hold all of."""
    return "float32" if form == "gptjax" or (form == "gguf" and checkpoint.dtype == "bfloat16") else checkpoint.dtype


def _write_workdir(folder: Path, checkpoint: Pretrained, dtype: str) -> None:
    from gptjax import checkpoint as runs

    if dtype != "float32":
        raise UserError(f"--dtype={dtype}: parameters of a workdir are float32, so that training can go on")
    if checkpoint.tokenizer is None:
        raise UserError("a workdir needs a tokenizer and this checkpoint has none: put its tokenizer.json beside it")
    runs.write_run(folder, Config(model=checkpoint.config), jax.tree.map(lambda p: p.astype(np.float32), checkpoint.params), checkpoint.tokenizer)


def _exportable(tokenizer: Tokenizer | None) -> PretrainedTokenizer | None:
    """The tokenizer in Hugging Face's form: as it came, or rewritten where it is GPT-2's. Others are not exported, and that is said."""
    if isinstance(tokenizer, PretrainedTokenizer) or tokenizer is None:
        return tokenizer
    if isinstance(tokenizer, OpenAITokenizer) and tokenizer.name == "gpt2":
        found = of_gpt2(tokenizer)
        found.chat_template = tokenizer.chat_template
        return found
    cli.say(f"note: a {tokenizer.kind} tokenizer has no Hugging Face form, so the export holds token ids only; keep the run's tokenizer/ folder")
    return None


def _write_hf(folder: Path, checkpoint: Pretrained, dtype: str, shard_bytes: int, name: str) -> None:
    c = checkpoint.config
    names = {ours: theirs for theirs, ours in transfer.DTYPES.items()}
    if dtype not in names:
        raise UserError(f"--dtype={dtype}: a Hugging Face folder is written as {', '.join(names)}")
    raw = hf.write_config(c, dtype, checkpoint.keep)
    tokenizer = _exportable(checkpoint.tokenizer)
    folder.mkdir(parents=True)
    size = np.dtype(jnp.dtype(dtype)).itemsize
    shards: list[list[Any]] = [[]]
    total = held = 0
    for tensor in transfer.from_params(c, checkpoint.params):
        nbytes = int(np.prod(tensor[1])) * size
        if shards[-1] and held + nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held, total = held + nbytes, total + nbytes
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        transfer.write_safetensors(folder / file, shard, dtype)
        places |= dict.fromkeys((tensor[0] for tensor in shard), file)
    if len(shards) > 1:
        files.write_text(folder / "model.safetensors.index.json", json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))
    generation = {**checkpoint.keep, **checkpoint.generation}
    for file, content in (("config.json", raw), ("generation_config.json", generation)):
        files.write_text(folder / file, json.dumps(content, indent=2))
    if tokenizer:
        for file, data in tokenizer.files().items():
            if file in FILES:
                files.write_bytes(folder / file, data)
        if tokenizer.chat_template and "chat_template.jinja" not in tokenizer.files():
            files.write_text(folder / "chat_template.jinja", tokenizer.chat_template)
        if "tokenizer_config.json" not in tokenizer.files():
            files.write_text(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    files.write_text(folder / "README.md", _card(name, raw, tree.size(checkpoint.params), dtype))


def _card(name: str, raw: Mapping[str, Any], count: int, dtype: str) -> str:
    classes = raw["architectures"][0].endswith("Classification")
    auto, tag = ("AutoModelForSequenceClassification", "text-classification") if classes else ("AutoModelForCausalLM", "text-generation")
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {tag}\ntags: [{raw['model_type']}, gptjax]\n---\n\n# {name}\n\n"
        f"A {raw['architectures'][0]} with {count:,} parameters, {dtype}, written by gptjax. Training data, evaluation, licence and limits are its author's to state here.\n\n"
        f'```python\nfrom transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )


@functools.partial(jax.jit, static_argnums=0)
def _hidden(c: ModelConfig, params: Any, tokens: Any) -> jax.Array:
    return model.apply(c, params, tokens)[0][0].astype(jnp.float32)


def probe_logits(checkpoint: Pretrained) -> np.ndarray:
    """float32 [T, V] (or [T, labels]) for fixed tokens, to compare two forms of one model (before any soft-cap)."""
    c = dataclasses.replace(checkpoint.config, scan=True, attention="reference", dropout=0.0, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (1, min(16, c.context))).astype(np.int32)

    hidden = np.asarray(_hidden(c, checkpoint.params, tokens))
    if c.labels:
        return np.asarray(model.score(checkpoint.params, jnp.asarray(hidden)))
    table, step = model.head(checkpoint.params), 4096  # a product with the whole table would hold a copy of it
    return np.concatenate([hidden @ table[i : i + step].astype(np.float32).T for i in range(0, len(table), step)], 1)[:, : c.vocab_size]


# How far logits may move, as a share of their largest, when weights are rounded to the type.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02, "q8_0": 0.1}


def convert(source: str | Path, target: Path, *, form: str, dtype: str = "", shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Reads, writes, reads again and compares. Raises UserError, and removes what it wrote, where the logits differ."""
    checkpoint = read(source, dtype="")
    dtype = dtype or default_dtype(checkpoint, form)
    before = probe_logits(checkpoint)
    write(target, checkpoint, form=form, dtype=dtype, shard_bytes=shard_bytes)
    count, exact = tree.size(checkpoint.params), dtype == checkpoint.dtype
    del checkpoint
    try:
        after = probe_logits(read(target, dtype=""))
        gap, scale = float(np.abs(after - before).max()), float(np.abs(before).max())
        if not gap <= _TOLERANCE["float32" if exact or dtype == "float32" else dtype] * scale:
            raise UserError(f"what was written to {target} gives other logits (by {gap:.3g} of {scale:.3g}), so it was removed: please report this")
    except BaseException:
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        raise
    return {"written": str(target), "format": form, "dtype": dtype, "parameters": count, "largest logit difference": gap, "largest logit": scale}


def export_adapters(source: str | Path, target: Path) -> dict[str, Any]:
    """The adapters of a run as a PEFT folder. Raises UserError where the run trained none."""
    from gptjax import checkpoint, peft

    config, trained, tokenizer, _ = checkpoint.load_run(Path(source))
    if not config.lora.on:
        raise UserError(f"{source} trained a whole model and no adapters: --format=hf writes it")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists already: name a new place")
    peft.write(target, config.model, config.lora, trained, config.train.init_from)
    if tokenizer.chat_template:
        files.write_text(target / peft.TEMPLATE, tokenizer.chat_template)
    return {"written": str(target), "format": "peft", "parameters": tree.size(trained), "base": config.train.init_from}


def main(argv: list[str]) -> None:
    flags = {
        "from": "workdir, Hugging Face folder or .gguf file",
        "to": "new folder or .gguf file",
        "format": "hf, gguf or gptjax (hf, or gguf where --to ends in .gguf); peft: a run's adapters alone",
        "dtype": "float32, bfloat16, float16, or q8_0 in GGUF (as stored)",
    }
    args = cli.parse(argv, __doc__, flags, required=("from", "to"))
    target = Path(args["to"])
    form = args["format"] or ("gguf" if target.suffix == ".gguf" else "hf")
    if form == "peft":
        cli.result(export_adapters(args["from"], target), args)
        return
    if form not in FORMATS:
        raise UserError(f"--format={form}: {config_lib.unknown_name('format', form, [*FORMATS, 'peft'])}")
    if args["dtype"] and args["dtype"] not in _TOLERANCE:
        raise UserError(f"--dtype={args['dtype']}: {config_lib.unknown_name('dtype', args['dtype'], list(_TOLERANCE))}")
    metrics.return_freed_memory()
    cli.result(convert(args["from"], target, form=form, dtype=args["dtype"]), args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
