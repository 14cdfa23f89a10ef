"""Scores of given texts by full forward passes: logits, log-probabilities, class probabilities.

In: an `InferenceModel` and rows of token ids. Out: NumPy arrays. Rows are padded to few lengths, so
that few programs are compiled; what is behind a row's end changes nothing before it.
Dims: B rows, T time, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation.loop import InferenceModel
from gptjax.model import head, transformer
from gptjax.ops import categorical
from gptjax.runtime import executables

_ROWS = 16  # at a time, of each group of devices


class TokenScores(NamedTuple):
    """Of each token of a row but the first."""

    logprobs: np.ndarray  # float32 [T - 1]: log-probability given the tokens before
    greedy: np.ndarray  # bool [T - 1]: whether it is the most likely token


@functools.partial(executables.jit, static_argnames=("config",))
def logits(config: ModelConfig, params: Any, tokens_BT: Array) -> Array:
    """float32 [B, T, V] of a full forward pass. Columns behind a row's end are garbage."""
    x, _ = transformer.apply(config, params, tokens_BT)
    return head.unembed(config, params, x)


@functools.partial(executables.jit, static_argnames=("config",))
def token_logprobs(config: ModelConfig, params: Any, tokens_BT: Array) -> tuple[Array, Array]:
    """As `TokenScores`, [B, T - 1] each. The logits of one row at a time are in memory."""
    x, _ = transformer.apply(config, params, tokens_BT[:, :-1])

    def score_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = row
        row_logits = head.unembed(config, params, hidden)
        greedy = jnp.argmax(row_logits, -1) == targets
        return categorical.logprob(row_logits, targets), greedy

    return jax.lax.map(score_row, (x, tokens_BT[:, 1:]))


@functools.partial(executables.jit, static_argnames=("config",))
def logprobs_at(config: ModelConfig, params: Any, tokens_BT: Array, places_BJ: Array) -> Array:
    """float32 [B, J, V]: log-probabilities of all tokens that may follow some of the places."""
    x, _ = transformer.apply(config, params, tokens_BT)
    hidden = jnp.take_along_axis(x, places_BJ[:, :, None], 1)
    return jax.nn.log_softmax(head.unembed(config, params, hidden))


@functools.partial(executables.jit, static_argnames=("config",))
def head_scores(config: ModelConfig, params: Any, tokens_BT: Array, length_B: Array) -> Array:
    """float32 [B, labels]: what the classifier head says of each row's last token."""
    x, _ = transformer.apply(config, params, tokens_BT)
    return head.score(params, jnp.take_along_axis(x, (length_B - 1)[:, None, None], 1)[:, 0])


def padded_logits(model: InferenceModel, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of ids [B, T], computed at a padded length."""
    length = tokens_BT.shape[1]
    padding = bucket(length, model.config.context) - length
    padded = np.pad(tokens_BT.astype(np.int32), ((0, 0), (0, padding)))
    padded = np.pad(padded, ((0, model.rows(len(tokens_BT)) - len(tokens_BT)), (0, 0)))
    padded_logits = logits(model.config, model.params, padded, mesh=model.mesh)
    return np.asarray(padded_logits)[: len(tokens_BT), :length]


def score_rows(model: InferenceModel, rows: Sequence[Sequence[int]]) -> list[TokenScores]:
    """The scores of each row of ids, a few rows at a time."""
    scores: list[Any] = [None] * len(rows)
    for group, tokens in _groups(model, rows, extra=1):  # a row's last token is no query
        logprobs, greedy = token_logprobs(model.config, model.params, tokens, mesh=model.mesh)
        logprobs, greedy = np.asarray(logprobs), np.asarray(greedy)
        for k, i in enumerate(group):
            end = len(rows[i]) - 1
            scores[i] = TokenScores(logprobs[k, :end], greedy[k, :end])
    return scores


def next_logprobs(
    model: InferenceModel, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """float32 [places, V] of each row: log-probabilities of what follows the tokens there."""
    logprobs: list[Any] = [None] * len(rows)
    width = 1 << (max(map(len, places)) - 1).bit_length()
    for group, tokens in _groups(model, rows, extra=0):
        padded = np.zeros((len(tokens), width), np.int32)
        for k, i in enumerate(group):
            padded[k, : len(places[i])] = places[i]
        group_logprobs = np.asarray(
            logprobs_at(model.config, model.params, tokens, padded, mesh=model.mesh)
        )
        for k, i in enumerate(group):
            logprobs[i] = group_logprobs[k, : len(places[i])]
    return logprobs


def classify_rows(
    model: InferenceModel, rows: Sequence[Sequence[int]], pad: int | None = None
) -> np.ndarray:
    """float32 [N, labels]: what `config.problem` says, probabilities or numbers.

    pad: an id that ends no row, as in transformers: what is read is the last of the others.
    Raises UserError for a row that is longer than the context.
    """
    if too_long := [len(row) for row in rows if len(row) > model.config.context]:
        raise UserError(
            f"a text has {max(too_long)} tokens and the model's context is "
            f"{model.config.context}: shorten it"
        )
    scores = np.zeros((len(rows), len(model.config.labels)), np.float32)
    for group, tokens in _groups(model, rows, extra=0):
        lengths = np.ones(len(tokens), np.int32)
        lengths[: len(group)] = [_length_without(rows[i], pad) for i in group]
        group_scores = np.asarray(
            head_scores(model.config, model.params, tokens, lengths, mesh=model.mesh)
        )
        scores[group] = group_scores[: len(group)]
    if model.config.problem == "regression":
        return scores
    if model.config.problem == "multi_label_classification":
        return np.exp(-np.logaddexp(0, -scores)).astype(np.float32)
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def _length_without(row: Sequence[int], pad: int | None) -> int:
    """Up to the last id that does not pad; 1 where all do."""
    length = len(row)
    while length > 1 and row[length - 1] == pad:
        length -= 1
    return length


def _groups(
    model: InferenceModel, rows: Sequence[Sequence[int]], *, extra: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """(numbers of a few rows of like lengths, their ids padded to a bucket and `extra` columns)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    most = _ROWS * model.groups
    height = model.rows(min(most, 1 << (len(rows) - 1).bit_length()))
    for first in range(0, len(order), most):
        group = order[first : first + most]
        longest = len(rows[group[-1]])
        width = extra + bucket(longest - extra, model.config.context, smallest=16)
        tokens = np.zeros((height, width), np.int32)
        for k, i in enumerate(group):
            tokens[k, : len(rows[i])] = rows[i]
        yield group, tokens


def bucket(length: int, context: int, *, smallest: int = 64) -> int:
    """Columns for rows of up to `length` tokens: few sizes, so few programs."""
    return min(max(smallest, 1 << max(length - 1, 0).bit_length()), context)
