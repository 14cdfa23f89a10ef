"""Losses without answers: of a run's held-out split, and of any documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

_MAX_LOSS = 700.0  # exp of more overflows


def held_out_scores(
    config: Config,
    mesh: Mesh,
    split: loader.Split,
    tokenizer: Tokenizer,
    eval_step: Any,
    params: Any,
    frozen: Any,
    *,
    before_batch: Callable[[], None],
) -> dict[str, float]:
    """Means over the held-out split, each target once; empty where it has no target.

    Of text: loss (nats), perplexity, bits per byte. Of classes and preferences: loss, accuracy. Of
    numbers: loss. eval_step: (params, batch, frozen) to sums of loss, weight, correct predictions.
    before_batch: called before each; it may raise, to end the evaluation.
    """
    labels, batch_size = config.model.labels, config.train.batch_size
    local_rows = sharding.local_rows(mesh, batch_size)
    total = weight = correct = byte_count = 0.0
    for batch in loader.eval_batches(
        split,
        batch_size=batch_size,
        rows=range(batch_size),
        limit=config.train.eval_batches,
    ):
        before_batch()
        if not labels:
            # of all rows, whichever process computes them
            byte_lengths = tokenizer.byte_counts(batch.targets)
            byte_count += float((byte_lengths * batch.loss_weights).sum())
        local = jax.tree.map(lambda array: array[local_rows], batch)
        sums = eval_step(params, sharding.to_global(mesh, local), frozen)
        batch_total, batch_weight, batch_correct = map(float, sums)
        total += batch_total
        weight += batch_weight
        correct += batch_correct
    if not weight:
        return {}
    scores = {"eval/loss": total / weight}
    if labels and config.model.problem == "regression":
        return scores
    if labels or task_of(config.task).counts_correct:
        scores["eval/accuracy"] = correct / weight
        return scores
    scores["eval/perplexity"] = math.exp(min(scores["eval/loss"], _MAX_LOSS))
    if byte_count:  # else nothing but ends of empty documents
        scores["eval/bits_per_byte"] = total / math.log(2) / byte_count
    return scores


def summary_line(values: dict[str, float]) -> str:
    """An evaluation in words: the loss first."""
    parts = []
    if "eval/loss" in values:
        parts.append(f"eval loss {values['eval/loss']:.4f}")
    for name, value in values.items():
        if name in ("eval/loss", "eval/perplexity"):
            continue
        is_bits = name == "eval/bits_per_byte"
        words = "bits per byte" if is_bits else progress.display_name(name)
        parts.append(f"{value:.4f} {words}")
    return ", ".join(parts)


def text_scores(lm: LanguageModel, documents: Iterator[str]) -> dict[str, Metric]:
    """loss, perplexity and bits per byte of documents, each token once.

    A document longer than the context is scored in windows: each token sees up to a complete
    context before it and, past the first window, at least half of one.
    """
    tokenizer = lm.text_tokenizer
    rows = []
    with cli.progress("documents scored") as advance:
        for document in documents:
            ids = [*(tokenizer.bos_ids or (tokenizer.eot,)), *tokenizer.encode(document)]
            logprobs = _document_logprobs(lm, ids)
            rows.append((-float(logprobs.sum()), float(len(logprobs)), len(document.encode())))
            advance(1)
    losses, tokens, byte_counts = np.array(rows, np.float64).T
    return loss_metrics.token_loss(losses, tokens, byte_counts)


def _document_logprobs(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """float32 [n - 1]: log-probability of each of n ids but the first."""
    lead = [lm.text_tokenizer.eot] * lm.prompt_tokens  # before each window
    size = lm.config.context - len(lead)  # tokens that a window may see
    stride = max(size // 2, 1)
    starts = [0]
    if len(ids) > size + 1:
        starts += range(stride, max(len(ids) - 1 - stride, stride), stride)
    windows = [lead + ids[start : start + size + 1] for start in starts]
    new = []
    for start, (logprobs, _) in zip(starts, lm.token_logprobs(windows), strict=True):
        already_scored = size - stride if start else 0
        new.append(logprobs[len(lead) + already_scored :])
    return np.concatenate(new)
