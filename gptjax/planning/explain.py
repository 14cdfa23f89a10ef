"""The numbers that follow from a config and its data, each with its reason.

In: a `TrainPlan` and the tokens of the training split. Out: rows to print. To add a number, add a
row to one of the functions below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.config.optim_config import OptimConfig, Rate
from gptjax.core import tree
from gptjax.model import init as model_init
from gptjax.training.setup import TrainPlan

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Number:
    """text: the value as people read it. reason: the settings or the formula it follows from."""

    name: str
    value: float
    text: str
    reason: str


def derived_numbers(plan: TrainPlan, tokens: int) -> list[Number]:
    """tokens: in the training split, filled up to complete rows where examples are packed."""
    return [*_of_model(plan), *_of_run(plan, tokens), *_of_optimizer(plan), _of_generation(plan)]


def format_numbers(numbers: Sequence[Number]) -> str:
    """A line a number, in three columns."""
    names = max(len(number.name) for number in numbers)
    texts = max(len(number.text) for number in numbers)
    return "\n".join(
        f"{number.name:<{names}}  {number.text:>{texts}}  {number.reason}" for number in numbers
    )


def _integer(name: str, value: int, reason: str) -> Number:
    return Number(name, value, f"{value:,}", reason)


def _of_model(plan: TrainPlan) -> list[Number]:
    model = plan.model
    state_bytes = tree.nbytes(plan.state_shapes)
    return [
        _integer(
            "vocabulary", model.vocab_size, "model.vocab_size, or the tokenizer's where that is 0"
        ),
        _integer(
            "embedding rows",
            model.padded_vocab,
            f"padded to a multiple of {model.vocab_multiple} (model.vocab_multiple); the padding "
            "never gets probability",
        ),
        _integer("head width C", model.head_width, "model.head_dim, or width / heads"),
        _integer("key/value heads K", model.kv, "model.kv_heads, or heads"),
        _integer(
            "MLP width F",
            model.mlp_width,
            "model.mlp_dim, or 4 x width (gelu), 8/3 x width in steps of 64 (swiglu, geglu)",
        ),
        _integer(
            "parameters", model_init.count_params(model), "without the padding of the vocabulary"
        ),
        Number(
            "training state",
            state_bytes,
            f"{state_bytes / MEBIBYTE:,.1f} MiB",
            f"float32 parameters and what {plan.config.optim.name} keeps, over all devices",
        ),
    ]


def _of_run(plan: TrainPlan, tokens: int) -> list[Number]:
    config, train = plan.config, plan.config.train
    per_step = train.batch_size * config.length
    seen = train.steps * per_step
    epochs = seen / max(tokens, 1)
    per_parameter = seen / model_init.count_params(plan.model)
    flops = plan.flops_per_token
    return [
        _integer(
            "tokens per step",
            per_step,
            "train.batch_size x data.length, or model.context where that is 0",
        ),
        _integer(
            "training tokens",
            tokens,
            "in the training split, filled up to complete rows where examples are packed",
        ),
        Number(
            "epochs", epochs, f"{epochs:.2f}", "train.steps x tokens per step / training tokens"
        ),
        Number(
            "tokens per parameter",
            per_parameter,
            f"{per_parameter:.1f}",
            "about 20 is compute-optimal (Hoffmann et al. 2022)",
        ),
        Number(
            "FLOPs per token",
            flops,
            f"{flops:.3g}",
            "6 x parameters that multiply + 12 x layers x heads x head width x context",
        ),
        Number(
            "FLOPs of the run",
            flops * seen,
            f"{flops * seen:.3g}",
            "FLOPs per token x tokens per step x train.steps",
        ),
        _integer(
            "micro-batch",
            train.batch_size // plan.micro_batches,
            "train.batch_size / train.grad_accum_steps, sequences at once",
        ),
    ]


def _of_optimizer(plan: TrainPlan) -> list[Number]:
    optim, steps = plan.config.optim, plan.config.train.steps
    last_rate = float(plan.schedule(steps - 1))
    return [
        _integer(
            "decay begins at step",
            _decay_start(plan.schedule, optim, steps),
            f"optim.schedule = {optim.schedule}",
        ),
        Number(
            "final learning rate",
            last_rate,
            f"{last_rate:.3g}",
            f"optim.schedule = {optim.schedule} at the last step",
        ),
    ]


def _decay_start(schedule: Rate, optim: OptimConfig, steps: int) -> int:
    """The last step at the peak before the learning rate falls; `steps` where it never does."""
    rates = np.asarray(schedule(np.arange(optim.warmup_steps, steps)))
    lower = np.flatnonzero(rates < optim.lr * (1 - 1e-6))
    return optim.warmup_steps + max(int(lower[0]) - 1, 0) if len(lower) else steps


def _of_generation(plan: TrainPlan) -> Number:
    model = plan.model
    bytes_per_value = 4 if model.dtype == "float32" else 2
    cache = 2 * model.layers * model.context * model.kv * model.head_width * bytes_per_value
    return Number(
        "cache per sequence",
        cache,
        f"{cache / MEBIBYTE:.2f} MiB",
        "2 x layers x context x K x C in the compute dtype, when generating",
    )
