"""The tuned lens: an affine map a layer, from its residual stream to that of the last layer.

In: a model and a text. Out: a `TunedLens`, whose maps turn the state before a layer into what the
rest of the model would make of it, so that the logit lens reads it better (Belrose et al. 2023,
equation 4: x + A x + b, starting at the identity, which is the logit lens). The maps are fitted in
closed form, as in Din et al. 2023: least squares to the last state, each position in units of that
state's length, as the final norm sees it; a ridge draws them to the identity. That takes seconds
where descending the paper's KL divergence takes hours. What counts is measured in the end: the KL
divergence on text that was held out; a layer that its map does not bring nearer keeps the identity.

Dims: N positions, D width, L layers, T time; states: that before each layer, then the last one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints.pretrained import params_digest
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import cli, files
from gptjax.core.types import Array
from gptjax.generation import tracing
from gptjax.generation.language_model import LanguageModel
from gptjax.model import head
from gptjax.model.layers import Norm

_ROW = 256  # positions of a row of text
_MOST = 8192  # positions of a text that are taken
_RIDGE = 0.01  # of the mean square of an input
_HELD_OUT = 8  # one row of so many is held out,
_APART = 8  # and of that every eighth position is looked at: logits take the most time


@dataclasses.dataclass(frozen=True)
class TunedLens:
    """maps: float32 [L, D, D], biases: float32 [L, D]; of the state before each layer.

    before, after: the mean KL(output || layer) in nats on held-out text, by the logit lens and by
    this one. model: which parameters it was fitted to.
    """

    maps: np.ndarray
    biases: np.ndarray
    before: tuple[float, ...]
    after: tuple[float, ...]
    model: str

    def translate(self, states: np.ndarray) -> np.ndarray:
        """States [L + 1, ..., D] as the last layer would have them; the last one as it is."""
        moved = np.einsum("l...d,lde->l...e", states[:-1], self.maps, optimize=True)
        biases = self.biases.reshape(len(self.biases), *[1] * (states.ndim - 2), -1)
        return np.concatenate([states[:-1] + moved + biases, states[-1:]])

    def save(self, path: str | Path) -> None:
        """Writes one .npz file."""
        with files.atomic(Path(path)) as place, open(place, "wb") as file:
            np.savez(file, **dataclasses.asdict(self))


def load(path: str | Path, lm: LanguageModel) -> TunedLens:
    """A lens that `TunedLens.save` wrote. Raises UserError for that of another model."""
    with np.load(path, allow_pickle=False) as content:
        lens = TunedLens(
            content["maps"],
            content["biases"],
            tuple(content["before"].tolist()),
            tuple(content["after"].tolist()),
            str(content["model"]),
        )
    if lens.model != params_digest(lm.params):
        raise UserError(f"{path}: this lens was fitted to another model: fit it again")
    return lens


def fit(lm: LanguageModel, tokens: Sequence[int]) -> TunedLens:
    """The lens of a model, fitted to a text of token ids, of which it takes the first 8,192.

    Raises UserError for a text with fewer tokens than the model has columns: it decides no map.
    """
    config, params = tracing.computation(lm)
    rows = _rows(tokens, config)
    held_out = max(len(rows) // _HELD_OUT, 1)
    size = config.width + 1
    inner = np.zeros((config.layers, size, size), np.float32)
    outer = np.zeros((config.layers, size, config.width), np.float32)
    with cli.progress("tuned lens: rows of text", len(rows)) as advance:
        for row in rows[:-held_out]:
            of_inner, of_outer = moments(config, params, row[None])
            inner += np.asarray(of_inner)
            outer += np.asarray(of_outer)
            advance(1)
        maps = np.stack([_solve(*sums) for sums in zip(inner, outer, strict=True)])
        before, after = np.zeros(config.layers), np.zeros(config.layers)
        for row in rows[-held_out:]:
            sums = divergences(config, params, maps, row[None])
            before += np.asarray(sums[0]) / held_out
            after += np.asarray(sums[1]) / held_out
            advance(1)
    worse = after > before
    maps[worse] = 0.0
    after = np.where(worse, before, after)
    digest = params_digest(lm.params)
    return TunedLens(
        maps[:, :-1], maps[:, -1], tuple(before.tolist()), tuple(after.tolist()), digest
    )


def _rows(tokens: Sequence[int], config: ModelConfig) -> np.ndarray:
    """int32 [rows, time] of the text; its end, shorter than a row, is left out."""
    length = min(_ROW, config.context)
    least = max(config.width, 2 * length)
    if len(tokens) < least:
        raise UserError(
            f"a tuned lens of this model needs a text of {least:,} tokens, and this one has "
            f"{len(tokens):,}"
        )
    count = min(math.ceil(max(_MOST, least) / length), len(tokens) // length)
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def _states(config: ModelConfig, params: Any, tokens_BT: Array) -> Array:
    """[L + 1, N, D]"""
    names = ("residual", "residual_after")
    values = tracing.capture(config, params, tokens_BT, names=names)
    states = jnp.concatenate([values["residual"], values["residual_after"][-1:]])
    return states.reshape(config.layers + 1, -1, config.width)


@functools.partial(jax.jit, static_argnames="config")
def moments(config: ModelConfig, params: Any, tokens_BT: Array) -> tuple[Array, Array]:
    """Sums over the positions: X'X [L, D + 1, D + 1] and X'Y [L, D + 1, D].

    X: a state and a 1, Y: what it lacks to the last state; both divided by the last one's length.
    """
    states_LND = _states(config, params, tokens_BT)
    last_ND = states_LND[-1]
    length_N1 = jnp.linalg.norm(last_ND, axis=-1, keepdims=True)

    def of_layer(state_ND: Array) -> tuple[Array, Array]:
        x = jnp.concatenate([state_ND, jnp.ones_like(length_N1)], -1) / length_N1
        return x.T @ x, x.T @ ((last_ND - state_ND) / length_N1)

    return jax.lax.map(of_layer, states_LND[:-1])


def _solve(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """The map and, in its last row, the bias: [D + 1, D]."""
    ridge = _RIDGE * np.trace(inner) / len(inner) * np.eye(len(inner), dtype=inner.dtype)
    return np.linalg.solve(inner + ridge, outer)


@functools.partial(jax.jit, static_argnames="config")
def divergences(
    config: ModelConfig, params: Any, maps: Array, tokens_BT: Array
) -> tuple[Array, Array]:
    """Means over some positions of KL(output || layer) [L], without the maps and with them."""
    states_LND = _states(config, params, tokens_BT)[:, _APART - 1 :: _APART]

    def log_odds(state_ND: Array) -> Array:
        normed: Any = Norm(config).apply({"params": params["final_norm"]}, state_ND)
        return jax.nn.log_softmax(head.unembed(config, params, normed))

    output = log_odds(states_LND[-1])

    def divergence(state_ND: Array) -> Array:
        return jnp.sum(jnp.exp(output) * (output - log_odds(state_ND)), -1).mean()

    def both(layer: tuple[Array, Array]) -> tuple[Array, Array]:
        state_ND, affine = layer
        moved_ND = state_ND + state_ND @ affine[:-1] + affine[-1]
        return divergence(state_ND), divergence(moved_ND)

    return jax.lax.map(both, (states_LND[:-1], maps))
