"""From a config to a run: `TrainPlan` (what follows from config and mesh) and `Run` (in a workdir).

`make_plan` derives shapes, optimizer, schedule and shardings without an array or a file.
`setup` resolves the config (checkpoint to start from, data, vocabulary), makes the plan, and
describes the run in its workdir after everything has been checked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from gptjax.checkpoints import pretrained
from gptjax.config import checks, schema
from gptjax.config.errors import UserError
from gptjax.config.optim_config import Rate
from gptjax.config.schema import Config, ModelConfig
from gptjax.core import cli, files
from gptjax.core.types import Batch, Params, TrainState
from gptjax.data import loader, selection, shards
from gptjax.data.packing import Packed
from gptjax.data.sources import TRAIN
from gptjax.model import init as model_init
from gptjax.ops.implementations import resolve
from gptjax.runtime import devices, sharding
from gptjax.runtime.compile_cache import Compiles
from gptjax.runtime.interrupt import Stop
from gptjax.runtime.mesh import make_mesh
from gptjax.tasks import loading
from gptjax.tasks.table import task_of
from gptjax.tokenizer.base import Tokenizer
from gptjax.tracking.throughput import flops_per_token
from gptjax.tracking.trackers import check_installed
from gptjax.training import auto, objectives, optim, report
from gptjax.training import state as train_state
from gptjax.training.checkpointing import check_same_run, kept_tokenizer, stored_fingerprint
from gptjax.training.memory import Shapes, loss_chunk

Data = shards.Prepared | loading.Examples


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What a run needs, derived once from its config and a mesh.

    The devices of the mesh may be described rather than present
    (`jax.experimental.topologies.get_topology_desc`): nothing here holds an array. The step, the
    loop and the planning tools take this object and derive none of it again.
    """

    config: Config  # as stored in config.json
    model: ModelConfig  # config.model without "auto", resolved for the mesh's devices
    mesh: jax.sharding.Mesh
    platform: str  # of the mesh's devices: cpu, gpu, tpu
    optimizer: optax.GradientTransformation
    schedule: Rate  # step -> learning rate
    # Shapes, dtypes and shardings (jax.ShapeDtypeStruct) of the three arguments of a step.
    state_shapes: TrainState
    frozen_shapes: Params
    batch_shapes: Batch
    micro_batches: int  # of a step
    loss_chunk: int  # positions of a micro-batch whose logits exist at once
    flops_per_token: float  # of training

    @property
    def state_shardings(self) -> TrainState:
        return sharding.shardings_of(self.state_shapes)

    @property
    def frozen_shardings(self) -> Params:
        return sharding.shardings_of(self.frozen_shapes)

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        return sharding.batch_sharding(self.mesh)


class AbstractState(NamedTuple):
    """Shapes and dtypes (`jax.ShapeDtypeStruct`) of what lasts from step to step, on no mesh."""

    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Params


def abstract_state(config: Config) -> AbstractState:
    """Of a config whose zeros are filled in (`resolve_config`).

    Raises UserError where a path pattern of `optim` or `lora` matches no parameter.
    """
    base, trainable = train_state.split_base_and_trainable(
        config, model_init.param_shapes(config.model)
    )
    frozen = jax.eval_shape(functools.partial(train_state.prepare_base, config), base)

    def init_params(frozen: Params, trainable: Params) -> Params:
        return train_state.init_trained(config, jax.random.key(0), frozen, trainable)

    params = jax.eval_shape(init_params, frozen, trainable)
    optimizer = optim.make_optimizer(config, params)
    new_state = functools.partial(train_state.new_state, config, optimizer)
    return AbstractState(optimizer, jax.eval_shape(new_state, frozen, trainable), frozen)


def make_plan(config: Config, mesh: jax.sharding.Mesh) -> TrainPlan:
    """The plan of a config whose zeros are filled in (`resolve_config`).

    What the config leaves on "auto" is chosen here. Raises UserError where a path pattern of
    `optim` or `lora` matches no parameter.
    """
    train, sizes = config.train, dict(mesh.shape)
    platform = devices.platform_of(mesh)
    implementation = resolve(config.model.implementation, platform=platform)
    optimizer, state, frozen = abstract_state(config)
    choice = auto.choose(
        config, Shapes.of(state, frozen), sizes, platform, devices.usable_bytes(mesh)
    )
    rows = train.batch_size // choice.micro_batches // (sizes["data"] * sizes["fsdp"])
    return TrainPlan(
        config=config,
        model=dataclasses.replace(
            config.model,
            implementation=implementation,
            remat=choice.remat,
            scan_layers=choice.scan_layers,
        ),
        mesh=mesh,
        platform=platform,
        optimizer=optimizer,
        schedule=optim.make_schedule(config),
        state_shapes=sharding.with_shardings(mesh, state),
        frozen_shapes=sharding.with_shardings(mesh, frozen),
        batch_shapes=sharding.with_batch_sharding(mesh, objectives.batch_shapes(config)),
        micro_batches=choice.micro_batches,
        loss_chunk=loss_chunk(config, sizes, max(rows, 1), platform),
        flops_per_token=flops_per_token(config, model_init.count_params(config.model)),
    )


@dataclasses.dataclass
class Run:
    """A run in its workdir: the plan, and what only this process has."""

    plan: TrainPlan
    workdir: Path
    data: Data
    compiles: Compiles
    stop: Stop
    meta: dict[str, Any]  # of every checkpoint: the config, and what a resumed run must not change
    source: pretrained.Pretrained | None = None  # the checkpoint that train.init_from names

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.plan.mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer

    @property
    def rows(self) -> list[int]:
        """Rows of the global batch that this process holds."""
        return sharding.local_rows(self.mesh, self.config.train.batch_size)

    def split(self, name: str) -> loader.Split:
        return split_rows(self.config, self.data, name)


def split_rows(config: Config, data: Data, name: str) -> loader.Split:
    """The rows of a split: packed examples of a task, or windows of documents."""
    if isinstance(data, shards.Prepared):
        return loader.Windows.of(
            data, name, config.length, mask_documents=config.data.mask_documents
        )
    examples = data.train if name == TRAIN else data.eval
    packed = [loading.packed_example(config, example) for example in examples]
    return Packed.of(packed, config.length, pack=config.task.pack, seed=config.train.seed)


def resolve_checkpoint(config: Config) -> tuple[Config, pretrained.Pretrained | None]:
    """The config with the model of `train.init_from`, and that checkpoint.

    The context (at most the checkpoint's), the dropout, the dtype and what does not shape the
    numbers stay the config's.
    """
    init_from = config.train.init_from
    if not init_from:
        return config, None
    source = pretrained.read_checkpoint(init_from)
    if source.tokenizer is None:
        raise UserError(
            f"train.init_from = {init_from!r} has no tokenizer: put its tokenizer.json next to it"
        )
    context = min(config.model.context, source.config.context)
    model = dataclasses.replace(config.model, **_shape_of(source.config) | {"context": context})
    # An absolute path: a run's adapters are read again from another working directory.
    path = Path(init_from).expanduser()
    train = dataclasses.replace(
        config.train, init_from=str(path.resolve()) if path.exists() else init_from
    )
    config = dataclasses.replace(config, model=model, train=train)
    if faults := checks.cross_checks(config):
        raise UserError("; ".join(faults))
    embed = source.params["embed"]
    prompt_tokens = len(embed.get("prompt", ()))
    if prompt_tokens and config.lora.prompt_tokens != prompt_tokens:
        raise UserError(
            f"train.init_from = {init_from!r} has {prompt_tokens} learned prompt "
            f"tokens: set lora.prompt_tokens = {prompt_tokens} to tune them on, or start from the "
            "checkpoint below them"
        )
    if "positions" in embed:
        embed["positions"] = embed["positions"][:context]
    return config, source


def _shape_of(model: ModelConfig) -> dict[str, Any]:
    """The settings of a checkpoint's model that training takes over."""
    own = {"dropout", "dtype", "context"}
    own |= {field.name for field in dataclasses.fields(model) if not field.metadata["shapes"]}
    return {name: value for name, value in dataclasses.asdict(model).items() if name not in own}


def load_data(
    config: Config,
    source: pretrained.Pretrained | None,
    *,
    tokenizer: Tokenizer | None = None,
    resumed: str = "",
) -> Data:
    """Examples of a task, or shards of documents.

    tokenizer: in place of the one that the config names; a checkpoint's own comes before both.
    resumed: the fingerprint of the data of a run that goes on, see `sources.open_source`.
    Shards that do not exist yet are made by the first process; the others wait and then open them
    (or make their own).
    """
    data = _load_data(config, source.tokenizer if source else tokenizer, resumed)
    cli.say(data.summary())
    return data


def _load_data(config: Config, tokenizer: Tokenizer | None, resumed: str) -> Data:
    if config.task.name:
        return loading.load_examples(config, tokenizer, resumed=resumed)
    ensure = functools.partial(shards.ensure, config, tokenizer, resumed=resumed)
    if jax.process_count() == 1:
        return ensure()
    prepared = ensure() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("data")
    return prepared or ensure()


def resolve_config(config: Config, data: Data) -> Config:
    """The config with what follows from the data: vocabulary, labels of a head, steps of epochs."""
    model, vocab_size = config.model, data.tokenizer.vocab_size
    if model.vocab_size and model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {vocab_size}: "
            "set 0 to take the tokenizer's"
        )
    labels = data.labels if isinstance(data, loading.Examples) and loading.has_head(config) else ()
    problem = task_of(config.task).problem if labels else ""
    # what follows from the number of labels stays unsaid, as in runs of earlier versions
    said = problem if problem == "multi_label_classification" else ""
    model = dataclasses.replace(
        model, vocab_size=model.vocab_size or vocab_size, labels=labels, problem_type=said
    )
    config = dataclasses.replace(config, model=model)
    epochs = config.train.epochs
    if not epochs:
        return config
    steps = max(1, math.ceil(epochs * rows_of_epoch(config, data) / config.train.batch_size))
    if config.optim.warmup_steps > steps:
        raise UserError(
            f"optim.warmup_steps = {config.optim.warmup_steps} exceeds the {steps} steps of "
            f"train.epochs = {epochs:g}: warm up for fewer"
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def rows_of_epoch(config: Config, data: Data) -> int:
    """Rows of batches in one pass over the training split."""
    if task_of(config.task).samples_rollouts and isinstance(data, loading.Examples):
        return len(data.train) * config.task.num_generations
    return split_rows(config, data, TRAIN).count


def fit_head(config: Config, source: pretrained.Pretrained) -> None:
    """Gives the checkpoint's parameters, in place, the head that the config needs.

    For classes its own head where the labels agree, else a new one; for tokens its own.
    """
    labels, params = config.model.labels, source.params
    if not labels:
        params.pop("score", None)
        if not config.model.tie_embeddings and "head" not in params:
            raise UserError(
                f"train.init_from = {config.train.init_from!r} tells classes apart and has no head "
                "for text: start from a language model"
            )
        return
    params.pop("head", None)
    same_head = (source.config.labels, source.config.problem) == (labels, config.model.problem)
    if not same_head or "score" not in params:
        random = np.random.Generator(np.random.Philox(key=config.train.seed))
        kernel = config.model.init_std * random.standard_normal((len(labels), config.model.width))
        params["score"] = {"kernel": kernel.astype(np.float32)}


def fingerprints(
    config: Config, data: Data, source: pretrained.Pretrained | None
) -> dict[str, str]:
    """What a resumed run must find unchanged: data, tokenizer, the checkpoint under adapters."""
    text = data.source if isinstance(data, shards.Prepared) else data.fingerprint
    base = pretrained.params_digest(source.params) if source and config.lora.on else ""
    return {"data": text, "tokenizer": data.tokenizer.fingerprint, "base": base}


def setup(
    config: Config, workdir: Path, overrides: dict[str, str], stop: Stop, compiles: Compiles
) -> Run:
    """Checks everything, then describes the run in its workdir.

    Nothing in the workdir is written when a check fails. Raises UserError.
    """
    check_installed(config.train.trackers)
    config, source = resolve_checkpoint(config)
    data = load_data(
        config,
        source,
        tokenizer=kept_tokenizer(workdir, config),
        resumed=stored_fingerprint(workdir),
    )
    config = resolve_config(config, data)
    if source:
        fit_head(config, source)
    plan = make_plan(config, make_mesh(config))
    if len(data.tokenizer.encode(config.train.sample_prompt)) > config.model.context:
        raise UserError(
            f"train.sample_prompt is longer than model.context = {config.model.context} tokens: "
            "shorten it"
        )
    digests = fingerprints(config, data, source)
    check_same_run(workdir, config, digests)
    if jax.process_index() == 0:
        report.clear_way(workdir)
        files.write_text(workdir / "config.json", schema.to_json(config))
        files.report_text(workdir / "overrides.json", json.dumps(overrides))
        data.tokenizer.save(workdir / "tokenizer")
        report.mark(
            workdir,
            status="running",
            argv=sys.argv,
            seed=config.train.seed,
            mesh=dict(plan.mesh.shape),
            selection=[*selection.describe(data.selections), data.summary()],
            **report.environment(),
            **digests,
        )
    meta = {"config": schema.to_dict(config), **digests}
    return Run(plan, workdir, data, compiles, stop, meta, source)
