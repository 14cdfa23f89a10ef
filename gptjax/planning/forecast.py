"""What a step and a run would take on a target: memory, traffic, time, money.

In: a config and a `Target`. Out: a `Forecast`. Everything follows from shapes: no array is made, no
file read, no device asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.config import build
from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.model import init as model_init
from gptjax.planning import communication
from gptjax.planning.communication import Transfer
from gptjax.planning.cost import ASSUMED_MFU, Cost, cost, measured_rate
from gptjax.planning.targets import Target
from gptjax.runtime.mesh import mesh_sizes
from gptjax.tokenizer.openai import VOCABULARIES
from gptjax.tokenizer.trained import ByteTokenizer
from gptjax.tracking.throughput import flops_per_token
from gptjax.training import auto, setup
from gptjax.training.auto import Choice
from gptjax.training.memory import FORWARD, RECOMPUTED, Memory, Shapes, Work, estimate


@dataclasses.dataclass(frozen=True)
class Rates:
    """What devices reach and cost."""

    peak: float  # FLOP/s of one
    mfu: float
    stated: bool  # that MFU is of this run; else of one that computes nothing again
    price: float | None  # USD an hour and device
    flops_per_token: float  # of training


@dataclasses.dataclass(frozen=True)
class Forecast:
    """config: as stated, with "auto" where it stands; choice: what that became."""

    config: Config
    target: Target
    sizes: Mapping[str, int]
    choice: Choice
    work: Work
    memory: Memory
    transfers: list[Transfer]
    cost: Cost
    parameters: int
    flops_per_token: float

    @property
    def usable(self) -> float:
        """Bytes that a program can have on one device."""
        return self.target.device.usable_of(self.target.count)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable


def config_without_data(settings: Any) -> Config:
    """The checked config of settings (a `ConfigDict`), whose data need not be there.

    Raises UserError for its faults, and where the vocabulary follows from data alone.
    """
    settings = settings.copy_and_resolve_references()
    if "data" in settings and not settings.data.get("path"):
        settings.data.path = "not read"
    config, _ = setup.resolve_checkpoint(build.build_config(settings))
    model, data = config.model, config.data
    if model.vocab_size:
        return config
    tokens = 0
    if data.tokenizer in VOCABULARIES:
        tokens = VOCABULARIES[data.tokenizer].eot + 1
    elif data.tokenizer == "bytes":
        tokens = ByteTokenizer().vocab_size
    elif data.tokenizer == "sentencepiece" and not data.tokenizer_path:
        tokens = data.tokenizer_vocab
    if not tokens:
        raise UserError(
            f"the vocabulary of data.tokenizer = {data.tokenizer!r} follows from data, and none is "
            "read for a --target: give its size, such as --config.model.vocab_size=32000"
        )
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=tokens))


def rates_of(config: Config, target: Target, mfu: float | None, price: float | None) -> Rates:
    """mfu: None assumes one. The peak is that of the table of devices; of a processor, which is
    this machine's, a measured one."""
    peak = target.device.peak
    if config.model.dtype == "float32":
        peak = target.device.peak_float32
    peak = peak or measured_rate(config.model.dtype) / target.count
    parameters = model_init.count_params(config.model)
    stated = mfu is not None
    return Rates(peak, mfu or ASSUMED_MFU, stated, price, flops_per_token(config, parameters))


def shapes_of(config: Config) -> Shapes:
    """Of all that lasts from step to step, over all devices."""
    abstract = setup.abstract_state(config)
    return Shapes.of(abstract.state, abstract.frozen)


def forecast(config: Config, shapes: Shapes, target: Target, rates: Rates) -> Forecast:
    """For the mesh of the config, which must be legal on that many devices (UserError)."""
    sizes = mesh_sizes(config, target.count)
    platform, usable = target.device.platform, target.device.usable_of(target.count)
    choice = auto.choose(config, shapes, sizes, platform, usable)
    work = Work.of(config, sizes, choice.micro_batches, choice.remat, platform)
    transfers = communication.transfers(shapes, work)
    again = RECOMPUTED[choice.remat].flops * FORWARD
    return Forecast(
        config=config,
        target=target,
        sizes=sizes,
        choice=choice,
        work=work,
        memory=estimate(shapes, work),
        transfers=transfers,
        cost=cost(
            flops_per_token=rates.flops_per_token,
            tokens_of_step=config.train.batch_size * config.length,
            steps=config.train.steps,
            target=target,
            rate=rates.peak,
            mfu=rates.mfu if rates.stated else rates.mfu / (1 + again),
            links=communication.seconds(transfers, target, sizes),
            price=rates.price,
        ),
        parameters=model_init.count_params(config.model),
        flops_per_token=rates.flops_per_token,
    )
