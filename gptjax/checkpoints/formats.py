"""Checkpoints in and out: a workdir, a Hugging Face folder or a GGUF file, read into one form and written as any of them.

    python -m gptjax.convert --from=PATH --to=PATH [--format=hf|gguf|gptjax|peft] [--dtype=float32|bfloat16|float16|q8_0]

What was written is read again, and its logits are compared with the original's before success is reported. Tensors are written one
by one, so memory holds the model once. --dtype defaults to the one that the checkpoint is stored in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints import gguf, huggingface, mapping, safetensors
from gptjax.checkpoints.pretrained import Pretrained, read_checkpoint
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config, ModelConfig
from gptjax.core import cli, files, tree
from gptjax.model import transformer
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.openai import OpenAITokenizer
from gptjax.tokenizer.pretrained import FILES, PretrainedTokenizer, of_gpt2

SHARD_BYTES = 5 << 30


FORMATS = ("hf", "gguf", "gptjax")


def write_checkpoint(
    path: Path,
    checkpoint: Pretrained,
    *,
    form: str = "hf",
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the checkpoint as a Hugging Face folder, a GGUF file or a workdir. `path` must not exist. Raises UserError."""
    if form not in FORMATS:
        raise UserError(unknown_name("format", form, list(FORMATS)))
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} exists already: name a new place")
    dtype = dtype or default_dtype(checkpoint, form)
    temporary = path.parent / f".{path.name}.writing"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.unlink(missing_ok=True)
    try:
        if form == "gguf":
            gguf.write_gguf(
                temporary,
                checkpoint.config,
                checkpoint.params,
                _exportable(checkpoint.tokenizer),
                dtype=dtype,
                name=path.stem,
            )
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
    return (
        "float32"
        if form == "gptjax" or (form == "gguf" and checkpoint.dtype == "bfloat16")
        else checkpoint.dtype
    )


def _write_workdir(folder: Path, checkpoint: Pretrained, dtype: str) -> None:
    from gptjax.checkpoints import store

    if dtype != "float32":
        raise UserError(
            f"--dtype={dtype}: parameters of a workdir are float32, so that training can go on"
        )
    if checkpoint.tokenizer is None:
        raise UserError(
            "a workdir needs a tokenizer and this checkpoint has none: put its tokenizer.json beside it"
        )
    store.write_run(
        folder,
        Config(model=checkpoint.config),
        jax.tree.map(lambda p: p.astype(np.float32), checkpoint.params),
        checkpoint.tokenizer,
    )


def _exportable(tokenizer: Tokenizer | None) -> PretrainedTokenizer | None:
    """The tokenizer in Hugging Face's form: as it came, or rewritten where it is GPT-2's. Others are not exported, and that is said."""
    if isinstance(tokenizer, PretrainedTokenizer) or tokenizer is None:
        return tokenizer
    if isinstance(tokenizer, OpenAITokenizer) and tokenizer.name == "gpt2":
        found = of_gpt2(tokenizer)
        found.chat_template = tokenizer.chat_template
        return found
    cli.say(
        f"note: a {tokenizer.kind} tokenizer has no Hugging Face form, so the export holds token ids only; keep the run's tokenizer/ folder"
    )
    return None


def _write_hf(
    folder: Path, checkpoint: Pretrained, dtype: str, shard_bytes: int, name: str
) -> None:
    c = checkpoint.config
    names = {ours: theirs for theirs, ours in safetensors.DTYPES.items()}
    if dtype not in names:
        raise UserError(f"--dtype={dtype}: a Hugging Face folder is written as {', '.join(names)}")
    raw = huggingface.write_config(c, dtype, checkpoint.keep)
    tokenizer = _exportable(checkpoint.tokenizer)
    folder.mkdir(parents=True)
    size = np.dtype(jnp.dtype(dtype)).itemsize
    shards: list[list[Any]] = [[]]
    total = held = 0
    for tensor in mapping.from_params(c, checkpoint.params):
        nbytes = int(np.prod(tensor[1])) * size
        if shards[-1] and held + nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held, total = held + nbytes, total + nbytes
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        safetensors.write_safetensors(folder / file, shard, dtype)
        places |= dict.fromkeys((tensor[0] for tensor in shard), file)
    if len(shards) > 1:
        files.write_text(
            folder / "model.safetensors.index.json",
            json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1),
        )
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
            files.write_text(
                folder / "tokenizer_config.json",
                json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}),
            )
    files.write_text(folder / "README.md", _card(name, raw, tree.size(checkpoint.params), dtype))


def _card(name: str, raw: Mapping[str, Any], count: int, dtype: str) -> str:
    classes = raw["architectures"][0].endswith("Classification")
    auto, tag = (
        ("AutoModelForSequenceClassification", "text-classification")
        if classes
        else ("AutoModelForCausalLM", "text-generation")
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {tag}\ntags: [{raw['model_type']}, gptjax]\n---\n\n# {name}\n\n"
        f"A {raw['architectures'][0]} with {count:,} parameters, {dtype}, written by gptjax. Training data, evaluation, licence and limits are its author's to state here.\n\n"
        f'```python\nfrom transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )


@functools.partial(jax.jit, static_argnums=0)
def _hidden(c: ModelConfig, params: Any, tokens: Any) -> jax.Array:
    return transformer.apply(c, params, tokens)[0][0].astype(jnp.float32)


def probe_logits(checkpoint: Pretrained) -> np.ndarray:
    """float32 [T, V] (or [T, labels]) for fixed tokens, to compare two forms of one model (before any soft-cap)."""
    c = dataclasses.replace(
        checkpoint.config, scan_layers=True, attention="reference", dropout=0.0, dtype="float32"
    )
    tokens = (
        np.random.default_rng(0).integers(0, c.vocab_size, (1, min(16, c.context))).astype(np.int32)
    )

    hidden = np.asarray(_hidden(c, checkpoint.params, tokens))
    if c.labels:
        return np.asarray(transformer.score(checkpoint.params, jnp.asarray(hidden)))
    table, step = (
        transformer.head(checkpoint.params),
        4096,
    )  # a product with the whole table would hold a copy of it
    return np.concatenate(
        [hidden @ table[i : i + step].astype(np.float32).T for i in range(0, len(table), step)], 1
    )[:, : c.vocab_size]


# How far logits may move, as a share of their largest, when weights are rounded to the type.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02, "q8_0": 0.1}


def convert(
    source: str | Path, target: Path, *, form: str, dtype: str = "", shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Reads, writes, reads again and compares. Raises UserError, and removes what it wrote, where the logits differ."""
    checkpoint = read_checkpoint(source, dtype="")
    dtype = dtype or default_dtype(checkpoint, form)
    before = probe_logits(checkpoint)
    write_checkpoint(target, checkpoint, form=form, dtype=dtype, shard_bytes=shard_bytes)
    count, exact = tree.size(checkpoint.params), dtype == checkpoint.dtype
    del checkpoint
    try:
        after = probe_logits(read_checkpoint(target, dtype=""))
        gap, scale = float(np.abs(after - before).max()), float(np.abs(before).max())
        if not gap <= TOLERANCE["float32" if exact or dtype == "float32" else dtype] * scale:
            raise UserError(
                f"what was written to {target} gives other logits (by {gap:.3g} of {scale:.3g}), so it was removed: please report this"
            )
    except BaseException:
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        raise
    return {
        "written": str(target),
        "format": form,
        "dtype": dtype,
        "parameters": count,
        "largest logit difference": gap,
        "largest logit": scale,
    }


def export_adapters(source: str | Path, target: Path) -> dict[str, Any]:
    """The adapters of a run as a PEFT folder. Raises UserError where the run trained none."""
    from gptjax.checkpoints import peft
    from gptjax.checkpoints.workdir import load_run

    config, trained, tokenizer, _ = load_run(Path(source))
    if not config.lora.on:
        raise UserError(f"{source} trained a whole model and no adapters: --format=hf writes it")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists already: name a new place")
    peft.write_adapter(target, config.model, config.lora, trained, config.train.init_from)
    if tokenizer.chat_template:
        files.write_text(target / peft.TEMPLATE, tokenizer.chat_template)
    return {
        "written": str(target),
        "format": "peft",
        "parameters": tree.size(trained),
        "base": config.train.init_from,
    }
