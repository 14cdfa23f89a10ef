"""What a prediction loses without a head: each head in turn reads its mean over the prompt.

Dims: those of `model.transformer`; N = L x H heads, B of them at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.tracing import Trace, computation, padded
from gptjax.interpretability.patching import ROWS, Overlay, batches_of, each_head, of_heads
from gptjax.model import head, transformer


def ablate_heads(lm: LanguageModel, trace: Trace, target: int, *, position: int = -1) -> np.ndarray:
    """float32 [L, H]: the change of log p(target) after a position, in nats, without each head.

    trace: of the prompt, with its `heads`. Below zero: the head speaks for the target.
    """
    config, params = computation(lm)
    tokens_BT = np.repeat(padded(lm, [trace.tokens.tolist()]), ROWS, axis=0)
    place = np.int32(range(len(trace.tokens))[position])
    means_L11HC = trace["heads"].mean(1)[:, None, None]
    heads_NLH = each_head(config.layers, config.heads)
    # behind all heads none at all, which is the model as it is
    places = np.concatenate([heads_NLH, np.zeros_like(heads_NLH[:1])])
    logprobs = []
    for batch in batches_of(places):
        change = Overlay("heads", means_L11HC, of_heads(batch))
        logprobs.append(_logprobs(config, params, tokens_BT, change, place, np.int32(target)))
    all_logprobs = np.concatenate(logprobs)
    changes = all_logprobs[: len(heads_NLH)] - all_logprobs[len(heads_NLH)]
    return changes.reshape(config.layers, config.heads)


@functools.partial(jax.jit, static_argnames="config")
def _logprobs(
    config: ModelConfig,
    params: Any,
    tokens_BT: Array,
    change: Overlay,
    position: Array,
    target: Array,
) -> Array:
    """float32 [B]: log p(target), with the change."""
    x_BTD, _ = transformer.apply(config, params, tokens_BT, hook=change)
    logits_BV = head.unembed(config, params, x_BTD[:, position])
    return jax.nn.log_softmax(logits_BV)[:, target]
