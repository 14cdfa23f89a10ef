"""TODO docstring."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config.schema import Config
from gptjax.core import cli
from gptjax.data import loader
from gptjax.generation.language_model import LanguageModel
from gptjax.metrics import loss as loss_metrics
from gptjax.metrics.bootstrap import Metric
from gptjax.runtime import sharding
from gptjax.tasks.table import task_of
from gptjax.tokenizer.base import Tokenizer
from gptjax.tracking import progress


def held_out_scores(
    config: Config,
    mesh: Mesh,
    split: loader.Split,
    tokenizer: Tokenizer,
    eval_step: Any,
    params: Any,
    frozen: Any,
) -> dict[str, float]:
    """Means over the held-out split, each target once: loss, and of text perplexity and bits per byte, of classes the accuracy."""
    byte_lengths = np.array([len(b) for b in tokenizer.token_bytes])
    total = weight = right = count = 0.0
    size, mine = config.train.batch_size, sharding.local_rows(mesh, config.train.batch_size)
    for batch in loader.eval_batches(
        split, batch_size=size, rows=range(size), limit=config.train.eval_batches
    ):
        if not config.model.labels:
            count += float(
                (byte_lengths[batch.targets] * batch.loss_weights).sum()
            )  # of all rows, whoever computes them
        local = jax.tree.map(lambda array: array[mine], batch)
        sums = eval_step(params, sharding.to_global(mesh, local), frozen)
        total, weight, right = (
            a + float(b) for a, b in zip((total, weight, right), sums, strict=True)
        )
    loss = total / weight
    if len(config.model.labels) == 1:
        return {"eval/loss": loss}
    if config.model.labels or task_of(config.task).counts_correct:
        return {"eval/loss": loss, "eval/accuracy": right / weight}
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": total / math.log(2) / max(count, 1.0),
    }


def summary_line(values: dict[str, float]) -> str:
    """An evaluation in words: the loss first."""
    names = {"eval/bits_per_byte": "bits per byte"}
    parts = [
        f"{value:.4f} {names.get(name, progress.display_name(name))}"
        for name, value in values.items()
        if name not in ("eval/loss", "eval/perplexity")
    ]
    return ", ".join(
        ([f"eval loss {values['eval/loss']:.4f}"] if "eval/loss" in values else []) + parts
    )


def text_scores(lm: LanguageModel, documents: Iterator[str]) -> dict[str, Metric]:
    """loss, perplexity and bits per byte of documents, each token once, given up to a whole context and (past the first window) at least half of one."""
    tokenizer, lead = lm.text_tokenizer, [lm.text_tokenizer.eot] * lm.prompt_places
    size = lm.config.context - len(lead)
    half = max(size // 2, 1)
    stats = []
    with cli.progress("documents scored") as advance:
        for document in documents:
            ids = [*(tokenizer.prefix or (tokenizer.eot,)), *tokenizer.encode(document)]
            starts = (
                [0, *range(half, max(len(ids) - 1 - half, half), half)]
                if len(ids) > size + 1
                else [0]
            )
            found = lm.token_logprobs([[*lead, *ids[s : s + size + 1]] for s in starts])
            new = np.concatenate(
                [
                    lp[len(lead) + (size - half) * bool(s) :]
                    for s, (lp, _) in zip(starts, found, strict=True)
                ]
            )
            stats.append((-float(new.sum()), float(len(new)), float(len(document.encode()))))
            advance(1)
    return loss_metrics.token_loss(*np.array(stats).T)
