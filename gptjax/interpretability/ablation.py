"""What a prediction loses without a head: each head in turn reads its mean over the prompt.

Dims: those of `model.transformer`; N = L x H heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.tracing import Trace, computation, padded
from gptjax.model import head, transformer

_ROWS = 16  # heads at a time


def ablate_heads(lm: LanguageModel, trace: Trace, target: int, *, position: int = -1) -> np.ndarray:
    """float32 [L, H]: the change of log p(target) after a position, in nats, without each head.

    trace: of the prompt, with its `heads`. Below zero: the head speaks for the target.
    """
    config, params = computation(lm)
    tokens_BT = np.repeat(padded(lm, [trace.tokens.tolist()]), _ROWS, axis=0)
    place = np.int32(range(len(trace.tokens))[position])
    means_LHC = trace["heads"].mean(1)
    layers_N, heads_N = np.divmod(np.arange(config.layers * config.heads), config.heads)
    logprobs = []
    # one place more than there are heads: in no layer, which is the model as it is
    for first in range(0, len(layers_N) + 1, _ROWS):
        chosen = np.full((2, _ROWS), -1, np.int32)
        part = slice(first, first + _ROWS)
        chosen[0, : len(layers_N[part])] = layers_N[part]
        chosen[1, : len(heads_N[part])] = heads_N[part]
        logprobs.append(
            np.asarray(
                _logprobs(config, params, tokens_BT, means_LHC, chosen, place, np.int32(target))
            )
        )
    all_logprobs = np.concatenate(logprobs)
    changes = all_logprobs[: len(layers_N)] - all_logprobs[len(layers_N)]
    return changes.reshape(config.layers, config.heads)


@functools.partial(jax.jit, static_argnames="config")
def _logprobs(
    config: ModelConfig,
    params: Any,
    tokens_BT: Array,
    means_LHC: Array,
    chosen_2B: Array,
    position: Array,
    target: Array,
) -> Array:
    """float32 [B]: log p(target), with the head of that layer replaced in each row."""

    def hook(name: str, value: Array, layer: int) -> Array:
        if name != "heads":
            return value
        is_head = jnp.arange(config.heads) == chosen_2B[1][:, None]
        here_BH = is_head & (chosen_2B[0] == layer)[:, None]
        return jnp.where(here_BH[:, None, :, None], means_LHC[layer], value)

    x_BTD, _ = transformer.apply(config, params, tokens_BT, hook=hook)
    logits_BV = head.unembed(config, params, x_BTD[:, position])
    return jax.nn.log_softmax(logits_BV)[:, target]
