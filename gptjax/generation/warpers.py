"""What shapes the distribution that a token is drawn from: top-k, top-p, min-p, typical.

Each takes logits [B, V], the settings of the rows and how to `add` up their numbers, and returns
the logits, -inf for tokens that are out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from gptjax.core.types import Array
from gptjax.ops.products import row_sum
from gptjax.ops.selection import least, sortable

Settings = Mapping[str, Array]  # of a batch: an array with a row per sequence, by name
Add = Callable[[Array], Array]  # [B, V] -> [B, 1]

_ROUNDING = 5e-7  # of a sum of probabilities, at most


def add(x: Array) -> Array:
    """[B, V] -> [B, 1]: the sum of each row."""
    return x.sum(-1, keepdims=True)


def add_in_order(x: Array) -> Array:
    """The same, in one order however many rows there are."""
    return row_sum(x)[..., None]


def top_k(logits: Array, settings: Settings, add: Add) -> Array:
    """Keeps the k largest logits and their equals."""
    keys, k = sortable(logits), settings["top_k"][:, None]
    k = jnp.where(k > 0, k, logits.shape[1])
    larger = lambda key: (keys > key).sum(-1, keepdims=True)
    smallest = least(lambda key: larger(key) < k, *_ends(keys))
    return jnp.where(keys < smallest, -jnp.inf, logits)


def top_p(logits: Array, settings: Settings, add: Add) -> Array:
    """Keeps the most likely tokens until their probability reaches p (Holtzman et al. 2020).

    Of equals, those with the larger id come first.
    """
    p, keys, probs = settings["top_p"][:, None], sortable(logits), _softmax(logits, add)
    ids = jnp.arange(logits.shape[1])[None]
    mass = lambda some: add(jnp.where(some, probs, 0.0))
    last = least(lambda key: mass(keys <= key) > 1 - p, *_ends(keys))
    equal, above = keys == last, mass(keys > last)
    each = jnp.where(equal, probs, 0.0).max(-1, keepdims=True)
    # How many of the last ones stay, by division: a sum of many equals rounds at each of them.
    staying = jnp.ceil((p - above - _ROUNDING) / each)
    staying = jnp.maximum(staying, jnp.where(above > 0, 0, 1))
    count = equal.sum(-1, keepdims=True)
    largest_id = jnp.where(equal & (count > 1), ids, 0).max(-1, keepdims=True)
    up_to = lambda number: (equal & (ids <= number)).sum(-1, keepdims=True)
    first = least(lambda number: up_to(number) > count - staying, jnp.zeros_like(last), largest_id)
    stays = (keys > last) | (equal & (ids >= first) & (staying > 0))
    return jnp.where(stays | (p >= 1), logits, -jnp.inf)


def min_p(logits: Array, settings: Settings, add: Add) -> Array:
    """Keeps tokens with at least this share of the best one's probability (Nguyen et al. 2024)."""
    share, ratio = settings["min_p"][:, None], jnp.exp(logits - logits.max(-1, keepdims=True))
    return jnp.where((ratio < share) & (share > 0), -jnp.inf, logits)


def typical(logits: Array, settings: Settings, add: Add) -> Array:
    """Keeps the tokens whose surprise is closest to the expected one (Meister et al. 2022).

    They are taken until their probability reaches `typical_p`, and the equals of the last one.
    """
    probs, mass = _softmax(logits, add), settings["typical_p"][:, None]
    surprise = -jnp.log(probs)
    entropy = add(jnp.where(probs > 0, probs * surprise, 0.0))
    keys = sortable(jnp.abs(surprise - entropy))
    limit = least(lambda key: add(jnp.where(keys <= key, probs, 0.0)) >= mass, *_ends(keys))
    return jnp.where((keys > limit) & (mass < 1), -jnp.inf, logits)


def _softmax(logits: Array, add: Add) -> Array:
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights / add(weights)


def _ends(keys: Array) -> tuple[Array, Array]:
    return keys.min(-1, keepdims=True), keys.max(-1, keepdims=True)
