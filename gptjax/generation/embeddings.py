"""One vector for each text: the mean of its tokens' last hidden states, of length one.

In: an `InferenceModel` and rows of token ids. Out: NumPy arrays. Dims: B rows, T time, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import scoring
from gptjax.generation.loop import InferenceModel
from gptjax.model import transformer
from gptjax.runtime import executables


@functools.partial(executables.jit, static_argnames=("config",))
def mean_states(config: ModelConfig, params: Any, tokens_BT: Array, length_B: Array) -> Array:
    """float32 [B, D]: the mean over each row's first tokens, divided by its length as a vector."""
    x_BTD, _ = transformer.apply(config, params, tokens_BT)
    inside_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
    total_BD = jnp.where(inside_BT[:, :, None], x_BTD.astype(jnp.float32), 0.0).sum(1)
    size_B1 = jnp.linalg.norm(total_BD, axis=1, keepdims=True)
    return total_BD / jnp.maximum(size_B1, 1e-30)


def embed_row(model: InferenceModel, row: Sequence[int]) -> np.ndarray:
    """float32 [D] of one text's ids. Raises UserError for one longer than the context."""
    context = model.config.context
    if len(row) > context:
        raise UserError(f"a text has {len(row)} tokens and the model's context is {context}")
    tokens = np.zeros((model.rows(1), scoring.bucket(len(row), context)), np.int32)
    tokens[0, : len(row)] = row
    lengths = np.ones(len(tokens), np.int32)
    lengths[0] = len(row)
    return np.asarray(mean_states(model.config, model.params, tokens, lengths, mesh=model.mesh))[0]
