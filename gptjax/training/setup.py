"""All that training needs, made once and checked before anything is written: config resolved, data opened, checkpoint to start from, mesh."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.checkpoints import pretrained
from gptjax.config import checks, schema
from gptjax.config.errors import UserError
from gptjax.config.schema import Config, ModelConfig
from gptjax.core import files
from gptjax.data import loader, shards
from gptjax.data.packing import Packed
from gptjax.data.sources import TRAIN
from gptjax.runtime import sharding
from gptjax.runtime.compile_cache import Compiles
from gptjax.runtime.interrupt import Stop
from gptjax.runtime.mesh import make_mesh
from gptjax.tasks import loading
from gptjax.tasks.table import task_of
from gptjax.tokenizer.base import Tokenizer
from gptjax.tracking.trackers import check_installed
from gptjax.training import report
from gptjax.training.checkpointing import check_same_run

Data = shards.Prepared | loading.Examples


@dataclasses.dataclass
class Run:
    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    data: Data
    compiles: Compiles
    stop: Stop
    meta: dict[
        str, Any
    ]  # what each of its checkpoints carries: the config and what else must not change
    source: pretrained.Pretrained | None = None  # what train.init_from names

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer

    @property
    def rows(self) -> list[int]:
        return sharding.local_rows(self.mesh, self.config.train.batch_size)

    def split(self, name: str) -> loader.Split:
        return split_rows(self.config, self.data, name)


def split_rows(config: Config, data: Data, name: str) -> loader.Split:
    """The rows of a split: packed examples of a task, or windows of documents."""
    if isinstance(data, shards.Prepared):
        return loader.Windows.of(data, name, config.length, isolate=config.data.mask_documents)
    units = [
        loading.packed_example(config, e) for e in (data.train if name == TRAIN else data.eval)
    ]
    return Packed.of(units, config.length, pack=config.task.pack, seed=config.train.seed)


def resolve_checkpoint(config: Config) -> tuple[Config, pretrained.Pretrained | None]:
    """The config with the model of `train.init_from`, and that checkpoint; context (at most the checkpoint's), dropout, dtype and what does not
    shape the numbers stay the config's."""
    if not config.train.init_from:
        return config, None
    found = pretrained.read_checkpoint(config.train.init_from)
    if found.tokenizer is None:
        raise UserError(
            f"train.init_from = {config.train.init_from!r} has no tokenizer: put its tokenizer.json beside it"
        )
    kept = {f.name for f in dataclasses.fields(ModelConfig) if not f.metadata["shapes"]} | {
        "dropout",
        "dtype",
        "context",
    }
    shape = {
        name: value for name, value in dataclasses.asdict(found.config).items() if name not in kept
    }
    context = min(config.model.context, found.config.context)
    place = Path(
        config.train.init_from
    ).expanduser()  # kept whole: a run's adapters are read again from another folder
    train = dataclasses.replace(
        config.train, init_from=str(place.resolve()) if place.exists() else config.train.init_from
    )
    changed = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **shape, context=context), train=train
    )
    if faults := checks.cross_checks(changed):
        raise UserError("; ".join(faults))
    if (
        places := len(found.params["embed"].get("prompt", ()))
    ) and config.lora.prompt_tokens != places:
        raise UserError(
            f"train.init_from = {config.train.init_from!r} has {places} learned prompt tokens: set lora.prompt_tokens = {places} to tune them on, "
            "or start from the checkpoint below them"
        )
    if "positions" in found.params["embed"]:
        found.params["embed"]["positions"] = found.params["embed"]["positions"][:context]
    return changed, found


def load_data(config: Config, source: pretrained.Pretrained | None) -> Data:
    """Examples, or shards: made by the first process where they do not exist yet; the others wait and then open (or make their own)."""
    tokenizer = source.tokenizer if source else None
    if config.task.name:
        return loading.load_examples(config, tokenizer)
    if jax.process_count() == 1:
        return shards.ensure(config, tokenizer)
    prepared = shards.ensure(config, tokenizer) if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("data")
    return prepared or shards.ensure(config, tokenizer)


def resolve_config(config: Config, data: Data) -> Config:
    """The config with what follows from the data: vocabulary, labels of a head, steps of so many epochs."""
    m, vocab_size = config.model, data.tokenizer.vocab_size
    if m.vocab_size and m.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {m.vocab_size} is smaller than the tokenizer's {vocab_size}: set 0 to take the tokenizer's"
        )
    labels = data.labels if isinstance(data, loading.Examples) and loading.has_head(config) else ()
    config = dataclasses.replace(
        config, model=dataclasses.replace(m, vocab_size=m.vocab_size or vocab_size, labels=labels)
    )
    if epochs := config.train.epochs:
        steps = max(1, math.ceil(epochs * rows_of_epoch(config, data) / config.train.batch_size))
        if config.optim.warmup_steps > steps:
            raise UserError(
                f"optim.warmup_steps = {config.optim.warmup_steps} exceeds the {steps} steps of train.epochs = {epochs:g}: warm up for fewer"
            )
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    return config


def rows_of_epoch(config: Config, data: Data) -> int:
    """Rows of batches in one pass over the training split."""
    if task_of(config.task).samples_rollouts and isinstance(data, loading.Examples):
        return len(data.train) * config.task.num_generations
    return split_rows(config, data, TRAIN).count


def fit_head(config: Config, source: pretrained.Pretrained) -> None:
    """Gives the checkpoint's parameters the head that the config asks for: classes (its own where the labels agree, else a new one) or tokens."""
    labels, params = config.model.labels, source.params
    if not labels:
        params.pop("score", None)
        if not config.model.tie_embeddings and "head" not in params:
            raise UserError(
                f"train.init_from = {config.train.init_from!r} tells classes apart and has no head for text: start from a language model"
            )
        return
    params.pop("head", None)
    if source.config.labels != labels or "score" not in params:
        random = np.random.Generator(np.random.Philox(key=config.train.seed))
        kernel = config.model.init_std * random.standard_normal((len(labels), config.model.width))
        params["score"] = {"kernel": kernel.astype(np.float32)}


def fingerprints(
    config: Config, data: Data, source: pretrained.Pretrained | None
) -> dict[str, str]:
    """What a resumed run must find unchanged: data, tokenizer and, where adapters stand on one, the checkpoint."""
    text = data.source if isinstance(data, shards.Prepared) else data.fingerprint
    base = pretrained.params_digest(source.params) if source and config.lora.on else ""
    return {"data": text, "tokenizer": data.tokenizer.fingerprint, "base": base}


def setup(
    config: Config, workdir: Path, overrides: dict[str, str], stop: Stop, compiles: Compiles
) -> Run:
    """Checks everything, then describes the run in its workdir; nothing is written when a check fails."""
    check_installed(config.train.trackers)
    config, source = resolve_checkpoint(config)
    data = load_data(config, source)
    config = resolve_config(config, data)
    if source:
        fit_head(config, source)
    mesh = make_mesh(config)
    if len(data.tokenizer.encode(config.train.sample_prompt)) > config.model.context:
        raise UserError(
            f"train.sample_prompt is longer than model.context = {config.model.context} tokens: shorten it"
        )
    prints = fingerprints(config, data, source)
    check_same_run(workdir, config, prints)
    if jax.process_index() == 0:
        files.write_text(workdir / "config.json", schema.to_json(config))
        files.write_text(workdir / "overrides.json", json.dumps(overrides))
        data.tokenizer.save(workdir / "tokenizer")
        report.mark(
            workdir,
            status="running",
            argv=sys.argv,
            seed=config.train.seed,
            mesh=dict(mesh.shape),
            **report.environment(),
            **prints,
        )
    return Run(
        config,
        workdir,
        mesh,
        data,
        compiles,
        stop,
        {"config": schema.to_dict(config), **prints},
        source,
    )
