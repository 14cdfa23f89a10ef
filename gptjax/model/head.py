"""What is read off hidden states: logits, scores of labels, log-probabilities, the loss.

x are hidden states as `transformer.apply` returns them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.ops import collectives, cross_entropy, quantized
from gptjax.ops.activation import softcap
from gptjax.ops.implementations import IMPLEMENTATIONS


def own_table(params: Params, dtype: Any = None) -> Float[Array, "V D"]:
    """This device's part of the output table [padded V, D]: its part of the vocabulary, and of that
    the columns that it holds; all of it on one device.

    dtype: None leaves it as it is stored, or float32 where it is kept as rows.
    """
    weight = params["head"] if "head" in params else params["embed"]
    if "rows" in weight:
        own = quantized.dequantize(weight)
    else:
        own = weight["kernel"] if "head" in params else weight["tokens"]
    return own.astype(dtype or own.dtype)


def unembed(config: ModelConfig, params: Params, x: Float[Array, "*S D"]) -> Float32[Array, "*S V"]:
    """Logits [..., V] in float32 of x [..., D], without the padding of the vocabulary."""
    weight = params["head"] if "head" in params else params["embed"]
    if "rows" in weight:
        quantized_matmul = IMPLEMENTATIONS[config.implementation].quantized_matmul
        logits = quantized_matmul(x.reshape(-1, x.shape[-1]), weight)
        logits = logits.reshape(*x.shape[:-1], -1)
    else:
        table_VD = cross_entropy.all_columns(own_table(params, x.dtype), x.shape[-1])
        logits = jnp.einsum("...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32)
    logits = collectives.gather(logits, "tensor", logits.ndim - 1)
    return softcap(logits[..., : config.vocab_size], config.logit_softcap)


def score(params: Params, x: Float[Array, "*S D"]) -> Float32[Array, "*S labels"]:
    """Scores of the labels, float32 [..., labels], of x [..., D]."""
    kernel = params["score"]["kernel"].astype(jnp.float32)
    return jnp.einsum("...D,CD->...C", x.astype(jnp.float32), kernel)


def token_cross_entropy(
    config: ModelConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
) -> Float32[Array, ""]:
    """Sum over positions of weight * -log p(target), float32 []; chunk: positions at a time.

    Of several devices, each one's share of the sum.
    """
    return IMPLEMENTATIONS[config.implementation].cross_entropy(
        x_BTD,
        own_table(params, x_BTD.dtype),
        targets_BT,
        weights_BT,
        vocab_size=config.vocab_size,
        softcap=config.logit_softcap,
        chunk=chunk,
    )


def token_logprobs(
    config: ModelConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    *,
    chunk: int,
) -> Float32[Array, "B T"]:
    """log p(target) of each position, float32 [B, T], `chunk` positions at a time."""
    return IMPLEMENTATIONS[config.implementation].logprobs(
        x_BTD,
        own_table(params, x_BTD.dtype),
        targets_BT,
        vocab_size=config.vocab_size,
        softcap=config.logit_softcap,
        chunk=chunk,
    )
