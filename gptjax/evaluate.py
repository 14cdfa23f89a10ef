"""What a model scores on held-out text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.config import Config
from gptjax.data import loader
from gptjax.data.prepare import Prepared
from gptjax.data.sources import EVAL


def held_out(config: Config, mesh: Mesh, prepared: Prepared, eval_step: Any, params: Any) -> dict[str, float]:
    """Loss per token, perplexity and bits per byte over the held-out split (each predicted token once)."""
    byte_lengths = np.array([len(b) for b in prepared.tokenizer.token_bytes])
    windows = loader.Windows.of(prepared, EVAL, config.model.context, isolate=config.data.isolate)
    total = weight = count = 0.0
    size, rows = config.train.batch_size, sharding.local_rows(mesh, config.train.batch_size)
    for batch in loader.eval_batches(windows, batch_size=size, rows=range(size), limit=config.train.eval_batches):
        count += float((byte_lengths[batch["targets"]] * batch["loss_weights"]).sum())  # of all rows, whoever computes them
        loss_sum, weight_sum = eval_step(params, sharding.to_global(mesh, {name: array[rows] for name, array in batch.items()}))
        total, weight = total + float(loss_sum), weight + float(weight_sum)
    loss = total / weight
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/bits_per_byte": total / math.log(2) / max(count, 1.0)}
