"""Checkpoints written in any form, and converted from one form into another.

A `Pretrained` becomes a Hugging Face folder, a GGUF file or a workdir. `convert` also reads again
what it wrote and compares the logits with the original's before it reports success. Tensors are
written one by one, so memory holds the model once.

To add a form, add a function to the branches of `write_checkpoint` and its name to `FORMATS`.
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

from gptjax.checkpoints import gguf, gguf_differences, huggingface, mapping, proof, safetensors
from gptjax.checkpoints.pretrained import Pretrained, read_checkpoint
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config, ModelConfig
from gptjax.core import cli, files, tree
from gptjax.model import head, transformer
from gptjax.ops.implementations import resolve
from gptjax.runtime.devices import default_platform
from gptjax.tokenizer import template_files
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.openai import OpenAITokenizer
from gptjax.tokenizer.pretrained import FILES, PretrainedTokenizer, from_gpt2

FORMATS = ("hf", "gguf", "gptjax")

# Hugging Face's limit for one file of weights.
SHARD_BYTES = 5 << 30

# How far logits may move, as a share of the largest, when weights are rounded to the dtype.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02, "q8_0": 0.1}


def write_checkpoint(
    path: Path,
    checkpoint: Pretrained,
    *,
    form: str = "hf",
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder ("hf"), a GGUF file ("gguf") or a workdir ("gptjax").

    path: must not exist; nothing is there before all is written. dtype: "" is `default_dtype`.
    shard_bytes: the most bytes in one file of a Hugging Face folder. Raises UserError.
    """
    if form not in FORMATS:
        raise UserError(unknown_name("format", form, list(FORMATS)))
    _refuse_existing(path)
    if form != "gptjax" and not isinstance(checkpoint.params, safetensors.LazyParams):
        prompt = checkpoint.params["embed"].get("prompt", ())
        if len(prompt):
            raise UserError(
                f"{len(prompt)} learned prompt tokens stand before every text of this model, and "
                f"{form} files have no place for them: keep its adapter (--format=peft of its run)"
            )
    dtype = dtype or default_dtype(checkpoint, form)
    temporary = path.parent / f".{path.name}.writing"
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        if form == "gguf":
            gguf.write_gguf(
                temporary,
                checkpoint.config,
                checkpoint.params,
                _hf_tokenizer(checkpoint.tokenizer),
                dtype=dtype,
                name=path.stem,
                generation=checkpoint.generation,
            )
        elif form == "hf":
            _write_hf(temporary, checkpoint, dtype, shard_bytes, path.name)
        else:
            _write_workdir(temporary, checkpoint, dtype)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    finally:
        _remove(temporary)


def _refuse_existing(path: Path) -> None:
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} exists already: name a new place")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def default_dtype(checkpoint: Pretrained, form: str) -> str:
    """The dtype of an export: the stored one, where the form has it.

    A workdir is float32. So is a GGUF file of bfloat16 weights, which float16 cannot hold all of.
    """
    if form == "gptjax" or (form == "gguf" and checkpoint.dtype == "bfloat16"):
        return "float32"
    return checkpoint.dtype


def _write_workdir(folder: Path, checkpoint: Pretrained, dtype: str) -> None:
    from gptjax.checkpoints import store

    if dtype != "float32":
        raise UserError(
            f"--dtype={dtype}: parameters of a workdir are float32, so that training can go on"
        )
    if checkpoint.tokenizer is None:
        raise UserError(
            "a workdir needs a tokenizer and this checkpoint has none: "
            "put its tokenizer.json next to it"
        )
    params = jax.tree.map(lambda p: p.astype(np.float32), checkpoint.params)
    store.write_run(folder, Config(model=checkpoint.config), params, checkpoint.tokenizer)


def _hf_tokenizer(tokenizer: Tokenizer | None) -> PretrainedTokenizer | None:
    """The tokenizer in Hugging Face's form: as it came, or rewritten where it is GPT-2's.

    Others cannot be exported: None, and a note on stderr.
    """
    if isinstance(tokenizer, PretrainedTokenizer) or tokenizer is None:
        return tokenizer
    if isinstance(tokenizer, OpenAITokenizer) and tokenizer.name == "gpt2":
        rewritten = from_gpt2(tokenizer)
        rewritten.chat_template = tokenizer.chat_template
        return rewritten
    cli.say(
        f"note: a {tokenizer.kind} tokenizer has no Hugging Face form, so the export holds "
        "token ids only; keep the run's tokenizer/ folder"
    )
    return None


def _write_hf(
    folder: Path, checkpoint: Pretrained, dtype: str, shard_bytes: int, name: str
) -> None:
    dtypes = list(safetensors.DTYPES.values())
    if dtype not in dtypes:
        raise UserError(f"--dtype={dtype}: a Hugging Face folder is written as {', '.join(dtypes)}")
    config = huggingface.write_config(checkpoint.config, dtype, checkpoint.keep)
    tokenizer = _hf_tokenizer(checkpoint.tokenizer)
    folder.mkdir(parents=True)
    _write_weights(folder, checkpoint, dtype, shard_bytes)
    generation = {**checkpoint.keep, **checkpoint.generation}
    files.write_text(folder / "config.json", json.dumps(config, indent=2))
    files.write_text(folder / "generation_config.json", json.dumps(generation, indent=2))
    if tokenizer:
        pad = config["pad_token_id"] if checkpoint.config.labels else None
        _write_tokenizer(folder, tokenizer, checkpoint.config.context, pad)
    card = _model_card(name, config, tree.size(checkpoint.params), dtype)
    files.write_text(folder / "README.md", card)


def _write_weights(folder: Path, checkpoint: Pretrained, dtype: str, shard_bytes: int) -> None:
    """One safetensors file, or several with an index where one would exceed `shard_bytes`."""
    itemsize = np.dtype(jnp.dtype(dtype)).itemsize
    shards: list[list[mapping.WritableTensor]] = [[]]
    total = in_shard = 0
    for tensor in mapping.from_params(checkpoint.config, checkpoint.params):
        nbytes = int(np.prod(tensor.shape)) * itemsize
        if shards[-1] and in_shard + nbytes > shard_bytes:
            shards.append([])
            in_shard = 0
        shards[-1].append(tensor)
        in_shard += nbytes
        total += nbytes
    if len(shards) == 1:
        safetensors.write_safetensors(folder / "model.safetensors", shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors.write_safetensors(folder / file, shard, dtype)
        weight_map |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _write_tokenizer(
    folder: Path, tokenizer: PretrainedTokenizer, context: int, pad: int | None
) -> None:
    """The tokenizer's files as they came, with the chat template that it has now.

    pad: a classifier's padding token, which transformers asks the tokenizer for when it batches.
    """
    contents = tokenizer.files()
    for file, data in contents.items():
        if file in FILES or file.startswith(template_files.FOLDER):
            files.write_bytes(folder / file, data)
    came = json.loads(contents.get("tokenizer_config.json", "{}"))
    settings = dict(came)
    if not came:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        # a file of its own would hide the others, which have names
        others = [entry for entry in templates if entry["name"] != "default"]
        default = {"name": "default", "template": tokenizer.chat_template}
        settings["chat_template"] = [default, *others] if tokenizer.chat_template else others
    elif tokenizer.chat_template:  # which a run may have brought
        files.write_text(folder / template_files.FILE, tokenizer.chat_template)
    if pad is not None:
        names = {i: name for name, i in tokenizer.control.items()}
        if not settings.get("pad_token") and pad in names:
            settings["pad_token"] = names[pad]
        if settings.get("model_max_length", context) >= context:
            settings["model_max_length"] = context  # else longer texts fail in a pipeline
    if settings != came:
        files.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1))


_MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: {tag}
tags: [{model_type}, gptjax]
---

# {name}

A {architecture} with {count:,} parameters, {dtype}, written by gptjax. \
Training data, evaluation, licence and limits are its author's to state here.

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


def _model_card(name: str, config: Mapping[str, Any], count: int, dtype: str) -> str:
    architecture = config["architectures"][0]
    classifies = architecture.endswith("Classification")
    return _MODEL_CARD.format(
        name=name,
        tag="text-classification" if classifies else "text-generation",
        auto="AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM",
        architecture=architecture,
        model_type=config["model_type"],
        count=count,
        dtype=dtype,
    )


@functools.partial(jax.jit, static_argnums=0)
def _hidden_states(config: ModelConfig, params: Any, tokens: Any) -> jax.Array:
    return transformer.apply(config, params, tokens)[0][0].astype(jnp.float32)


def probe_logits(checkpoint: Pretrained) -> np.ndarray:
    """float32 [T, V], or [T, labels], for fixed tokens: to compare two forms of one model.

    They are the logits before a final soft-cap.
    """
    implementation = resolve(checkpoint.config.implementation, platform=default_platform())
    config = dataclasses.replace(
        checkpoint.config,
        scan_layers=True,
        attention="reference",
        dropout=0.0,
        dtype="float32",
        implementation=implementation,
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, min(16, config.context)))
    hidden = np.asarray(_hidden_states(config, checkpoint.params, tokens.astype(np.int32)))
    if config.labels:
        return np.asarray(head.score(checkpoint.params, jnp.asarray(hidden)))
    # in strips: a product with the complete table would hold a float32 copy of it
    table, step = head.own_table(checkpoint.params), 4096
    strips = []
    for start in range(0, len(table), step):
        strips.append(hidden @ table[start : start + step].astype(np.float32).T)
    return np.concatenate(strips, axis=1)[:, : config.vocab_size]


def convert(
    source: str | Path, target: Path, *, form: str, dtype: str = "", shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Reads, writes, reads again and compares; the result is a report of all that.

    Raises UserError, and removes what it wrote, where the logits differ by more than `TOLERANCE`
    or the tokenizer does anything else with the texts of `proof.probe_texts`.
    """
    checkpoint = read_checkpoint(source, dtype="")
    dtype = dtype or default_dtype(checkpoint, form)
    before, tokenizer = probe_logits(checkpoint), _probe_tokenizer(checkpoint.tokenizer, form)
    write_checkpoint(target, checkpoint, form=form, dtype=dtype, shard_bytes=shard_bytes)
    count, is_exact = tree.size(checkpoint.params), dtype in ("float32", checkpoint.dtype)
    del checkpoint  # before the copy is read: memory holds the model once
    report: dict[str, Any] = {"written": str(target), "format": form, "dtype": dtype}
    try:
        written = read_checkpoint(target, dtype="")
        gap, scale = (
            float(np.abs(probe_logits(written) - before).max()),
            float(np.abs(before).max()),
        )
        tolerance = TOLERANCE["float32" if is_exact else dtype]
        if not gap <= tolerance * scale:  # so written that a NaN is a difference
            raise UserError(f"other logits (by {gap:.3g} of {scale:.3g})")
        if tokenizer and written.tokenizer:
            proof.compare_tokenizers(
                tokenizer, proof.probe_tokenizer(written.tokenizer, tokenizer.texts)
            )
            report["texts cut alike"] = len(tokenizer.texts)
    except BaseException as error:
        _remove(target)
        if isinstance(error, UserError):
            raise UserError(
                f"what was written to {target}, read again, gives {error}.\n"
                "So it was removed: please report this"
            ) from None
        raise
    return {
        **report,
        "parameters": count,
        "largest logit difference": gap,
        "largest logit": scale,
    }


def _probe_tokenizer(tokenizer: Tokenizer | None, form: str) -> proof.TokenizerProbe | None:
    """What the tokenizer does, on texts with which it does the same in this form."""
    if tokenizer is None:
        return None
    texts = proof.probe_texts(tokenizer)
    described = tokenizer.files().get("tokenizer.json")
    if form == "gguf" and described and gguf_differences.only_composes(json.loads(described)):
        texts = proof.composed(texts)  # a note has said that a file cannot ask for it
    return proof.probe_tokenizer(tokenizer, texts)


def export_adapters(source: str | Path, target: Path) -> dict[str, Any]:
    """Writes the adapters of a run as a PEFT folder. Raises UserError where it trained none."""
    from gptjax.checkpoints import peft
    from gptjax.checkpoints.workdir import load_run

    config, adapters, tokenizer, _ = load_run(Path(source))
    if not config.lora.on:
        raise UserError(f"{source} trained all weights and no adapters: --format=hf writes it")
    _refuse_existing(target)
    peft.write_adapter(target, config.model, config.lora, adapters, config.train.init_from)
    if tokenizer.chat_template:
        files.write_text(target / template_files.FILE, tokenizer.chat_template)
    return {
        "written": str(target),
        "format": "peft",
        "parameters": tree.size(adapters),
        "base": config.train.init_from,
    }
