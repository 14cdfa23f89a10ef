"""The logit lens: what the model would predict if it ended before a layer (nostalgebraist 2020).

In: a `Trace` with its residual stream. Out: for each state (that before each layer, then the last
one) and position the likeliest tokens, by the final norm and the unembedding.
Dims: those of `model.transformer`; N = L + 1 states.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.tracing import Trace, computation
from gptjax.model import head
from gptjax.model.layers import Norm


@dataclasses.dataclass(frozen=True)
class LensReadings:
    """tokens: int32 [N, T, top], the likeliest first; probabilities: float32 [N, T, top].

    entropy: float32 [N, T], nats. targets: int32 [T]; target_logprobs: float32 [N, T], of the
    targets, and ranks: int32 [N, T], how many tokens are likelier than they.
    """

    tokens: np.ndarray
    probabilities: np.ndarray
    entropy: np.ndarray
    targets: np.ndarray
    target_logprobs: np.ndarray
    ranks: np.ndarray


def states(trace: Trace) -> np.ndarray:
    """float32 [N, T, D]: the residual stream before each layer and after the last one."""
    return np.concatenate([trace["residual"], trace["residual_after"][-1:]])


def logit_lens(
    lm: LanguageModel,
    trace: Trace,
    *,
    top: int = 5,
    targets: np.ndarray | None = None,
    states_NTD: np.ndarray | None = None,
) -> LensReadings:
    """What the states of a trace say of the token after each position.

    targets: int32 [T], tokens whose rank is asked for; by default those that the last state
        predicts. states_NTD: other states, such as `TunedLens.translate` makes.
    """
    config, params = computation(lm)
    if states_NTD is None:
        states_NTD = states(trace)
    if targets is None:
        last = _read(config, params, states_NTD[-1:], np.zeros(len(trace.tokens), np.int32), 1)
        targets = np.asarray(last[0])[0, :, 0]
    targets = np.asarray(targets, np.int32)
    tokens, probabilities, entropy, logprobs, ranks = map(
        np.asarray, _read(config, params, states_NTD, targets, top)
    )
    return LensReadings(tokens, probabilities, entropy, targets, logprobs, ranks)


def read_out(config: ModelConfig, params: Params, x: Array) -> Array:
    """Logits float32 [..., V] of the residual stream x [..., D]: unembed(final_norm(x))."""
    normed: Any = Norm(config).apply({"params": params["final_norm"]}, x)
    return head.unembed(config, params, normed)


@functools.partial(jax.jit, static_argnames=("config", "top"))
def _read(
    config: ModelConfig, params: Params, states_NTD: Array, targets_T: Array, top: int
) -> tuple[Array, ...]:
    """As `LensReadings` has them; the logits of one state at a time are in memory."""

    def read(state_TD: Array) -> tuple[Array, ...]:
        logprobs_TV = jax.nn.log_softmax(read_out(config, params, state_TD))
        best, tokens = jax.lax.top_k(logprobs_TV, top)
        entropy = -jnp.sum(jnp.exp(logprobs_TV) * logprobs_TV, -1)
        of_target = jnp.take_along_axis(logprobs_TV, targets_T[:, None], 1)
        ranks = jnp.sum(logprobs_TV > of_target, -1)
        return tokens, jnp.exp(best), entropy, of_target[:, 0], ranks

    return jax.lax.map(read, states_NTD)
