"""Heads by what they look at: the token before, the same token, or what followed it last time.

On random tokens that are repeated once, an induction head looks from a token to the one behind its
first occurrence (Olsson et al. 2022, "prefix matching"): the pattern by which models go on as a
text went before. A previous-token head, which it needs, looks one position back; a duplicate-token
head to the first occurrence itself (Wang et al. 2022).
Dims: those of `model.transformer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gptjax.config.errors import UserError
from gptjax.generation.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """float32 [L, H] each: the mean attention to that place, from 0 to 1."""

    induction: np.ndarray
    previous_token: np.ndarray
    duplicate_token: np.ndarray

    def highest(self, kind: str, count: int = 5) -> Iterator[tuple[int, int, float]]:
        """(layer, head, score) of the heads with the highest scores of a kind."""
        scores = getattr(self, kind)
        for place in np.argsort(-scores, axis=None, kind="stable")[:count]:
            layer, number = divmod(int(place), scores.shape[1])
            yield layer, number, float(scores[layer, number])


def score_heads(
    lm: LanguageModel, *, length: int = 24, texts: int = 4, seed: int = 0
) -> HeadScores:
    """The scores of all heads on `texts` texts of `length` random tokens, each twice.

    The text begins as every text of the model does (`lm.encode`), and the tokens are drawn from the
    whole vocabulary. Raises UserError where the context is too short.
    """
    start = [] if lm.tokenizer is None else [*lm.tokenizer.bos_ids]
    if (needed := len(start) + 2 * length) > lm.config.context:
        raise UserError(
            f"{length} tokens twice need {needed} positions and the model's context is "
            f"{lm.config.context}: set length lower"
        )
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(texts):
        once = generator.integers(0, lm.config.vocab_size, length).tolist()
        rows.append([*start, *once, *once])
    traces = lm.trace(rows, names=["pattern"])
    pattern_LHTS = np.mean([trace["pattern"] for trace in traces], 0)
    again = len(start) + length  # where the tokens are repeated

    def mean_at(back: int, first: int) -> np.ndarray:
        """What queries from `first` on pay to the key so many positions before them."""
        places = np.arange(first, pattern_LHTS.shape[2])
        return pattern_LHTS[:, :, places, places - back].mean(-1)

    return HeadScores(
        induction=mean_at(length - 1, again),
        previous_token=mean_at(1, len(start) + 1),
        duplicate_token=mean_at(length, again),
    )
