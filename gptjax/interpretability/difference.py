"""What tells two checkpoints of one shape apart: settings, tensors, and predictions on a prompt.

In: two `LanguageModel`s, such as a base and a run that tuned it, a model and the same with an
adapter, an export and what it was made from. Out: a `Difference` of plain numbers.
Dims: T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoints import peft_config
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.requests import Prompt

_TOP = 5  # tokens of each model that are listed at a position

# Settings of how a model is computed or trained, which change nothing of what it says, and sizes
# that tensors show.
_NOT_COMPARED = (
    *("implementation", "attention", "attention_block", "remat", "scan_layers", "dtype"),
    *("vocab_multiple", "init_std", "dropout", "family", "context"),
    *("kv_heads", "head_dim", "mlp_dim"),
)


@dataclasses.dataclass(frozen=True)
class TensorChange:
    """How far a parameter moved; of one that each layer has, a change for each layer."""

    path: str
    layer: int | None
    relative: float  # |second - first| / |first|, Frobenius norms; inf where the first is all zero


@dataclasses.dataclass(frozen=True)
class PredictionChange:
    """What both say of the token after a position."""

    position: int
    divergence: float  # KL(first || second), nats
    tokens: tuple[int, ...]  # the likeliest of the first, then those of the second that are new
    first: tuple[float, ...]  # their probabilities
    second: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """settings: (name, first, second). unmatched: a line for each tensor that only one has, or
    that has another shape. reason: why predictions were not compared, else empty.
    """

    settings: tuple[tuple[str, Any, Any], ...]
    tensors: tuple[TensorChange, ...]
    unmatched: tuple[str, ...]
    predictions: tuple[PredictionChange, ...]
    reason: str = ""

    @property
    def moved(self) -> list[TensorChange]:
        """The tensors that are not equal, the most changed first."""
        return sorted((t for t in self.tensors if t.relative), key=lambda t: -t.relative)


def load_other(path: str | Path, lm: LanguageModel) -> LanguageModel:
    """What is at `path`: a checkpoint, or this model with the PEFT adapter there."""
    if (Path(path).expanduser() / peft_config.CONFIG).is_file():
        return lm.with_adapter(path)
    return language_model.load(path, weights=lm.weights)


def compare(first: LanguageModel, second: LanguageModel, prompt: Prompt) -> Difference:
    """The difference of two models, with their predictions along the prompt.

    Raises UserError for models whose blocks have different tensors, which nothing can compare.
    """
    flat = [_trimmed(lm) for lm in (first, second)]
    unmatched = tree.difference(*flat)
    in_blocks = [line for line in unmatched if "blocks/" in line]
    if in_blocks:
        more = f" and {len(in_blocks) - 3} more" if len(in_blocks) > 3 else ""
        raise UserError(
            f"the two checkpoints are of different shapes: {'; '.join(in_blocks[:3])}{more}"
        )
    reason = _why_not_predictions(first, second, prompt)
    predictions: tuple[PredictionChange, ...] = ()
    if not reason:
        ids = [first.encode(prompt)]
        predictions = compare_predictions(first.logits(ids)[0], second.logits(ids)[0])
    return Difference(
        settings=tuple(_settings_that_differ(first.config, second.config)),
        tensors=tuple(compare_tensors(*flat)),
        unmatched=tuple(unmatched),
        predictions=predictions,
        reason=reason,
    )


def compare_tensors(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> Iterator[TensorChange]:
    """The changes of the tensors that both have in one shape; by {path: array}."""
    for path, a in first.items():
        b = second.get(path)
        if b is None or a.shape != b.shape:
            continue
        if path.startswith("blocks/"):
            for layer in range(len(a)):
                yield TensorChange(path, layer, relative_change(a[layer], b[layer]))
        else:
            yield TensorChange(path, None, relative_change(a, b))


def relative_change(first: np.ndarray, second: np.ndarray) -> float:
    """|second - first| / |first|, Frobenius norms."""
    moved, size = float(np.linalg.norm(second - first)), float(np.linalg.norm(first))
    if not moved:
        return 0.0
    return moved / size if size else math.inf


def compare_predictions(
    first_TV: np.ndarray, second_TV: np.ndarray, *, top: int = _TOP
) -> tuple[PredictionChange, ...]:
    """The change at each position, of two arrays of logits."""
    changes = []
    for position in range(len(first_TV)):
        a, b = (_log_softmax(logits[position]) for logits in (first_TV, second_TV))
        divergence = max(float(np.sum(np.exp(a) * (a - b))), 0.0)
        best = [np.argsort(-log_odds, kind="stable")[:top] for log_odds in (a, b)]
        tokens = list(dict.fromkeys(np.concatenate(best).tolist()))
        odds = [tuple(np.exp(log_odds[tokens]).tolist()) for log_odds in (a, b)]
        changes.append(PredictionChange(position, divergence, tuple(tokens), *odds))
    return tuple(changes)


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted = logits_V.astype(np.float64) - logits_V.max()
    return shifted - np.log(np.exp(shifted).sum())


def _trimmed(lm: LanguageModel) -> dict[str, np.ndarray]:
    """{path: array} of the parameters, tables without the padding of the vocabulary."""
    flat = tree.flatten(lm.params)
    for path in ("embed/tokens", "head/kernel"):
        if path in flat:
            flat[path] = flat[path][: lm.config.vocab_size]
    return flat


def _settings_that_differ(first: ModelConfig, second: ModelConfig) -> Iterator[tuple]:
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if a != b and field.name not in _NOT_COMPARED:
            yield field.name, a, b


def _why_not_predictions(first: LanguageModel, second: LanguageModel, prompt: Prompt) -> str:
    if first.config.labels or second.config.labels:
        return "a classifier predicts no tokens"
    if first.config.vocab_size != second.config.vocab_size:
        sizes = f"{first.config.vocab_size:,} and {second.config.vocab_size:,}"
        return f"the vocabularies have {sizes} tokens"
    if first.encode(prompt) != second.encode(prompt):
        return "their tokenizers cut the prompt differently"
    return ""
