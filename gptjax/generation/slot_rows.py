"""What the programs of `slots.SlotEngine` are told about their rows.

A `Row` is one text: tokens, limits, settings, key. `stack_rows` makes the arguments of a call of
them, and `read_numbers` takes these apart in the program: all numbers of a row lie side by side,
because each array of a call takes the host its time (`guided.py` says how much).
`stack_adapters` puts the adapters of several models beside one another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.types import Array
from gptjax.generation import sampling
from gptjax.generation.loop import DecodeState
from gptjax.generation.requests import Request
from gptjax.model import quantize

_CACHE_BYTES = 2 << 30  # of keys and values, where the context would need more
_ENDS = 8  # end tokens of a row that any program has room for
_NO_END = -1
# What is known of a row in a number, at its column; behind them come its end tokens.
_COLUMNS = ("length", "prompt_length", "limit", "seed", "adapter")
_SETTINGS = {name: default for name, default in sampling.NUMBERS.items() if name != "seed"}


@dataclasses.dataclass
class Row:
    """One text."""

    tokens: list[int]  # so far
    prompt_length: int
    limit: int  # the longest length
    adapter: int
    active: frozenset[str]
    numbers: np.ndarray  # int32 [C]: its row of `Batch.numbers`
    settings: dict[str, np.ndarray]  # "banned" and "logit_bias", each with one row


class Batch(NamedTuple):
    """The arguments of `slot_programs.decode` that change with every call."""

    tokens: np.ndarray  # int32 [N, S]
    numbers: np.ndarray  # int32 [N, C], or the bits of float32
    settings: dict[str, np.ndarray]  # those with more than a number for each row

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Of what depends on the texts; of "allowed" too, once it is there."""
        settings = sorted((name, array.shape) for name, array in self.settings.items())
        return self.numbers.shape[1], *settings


def build_row(request: Request, vocab_size: int, adapter: int) -> Row:
    """The row of a request for one text. Raises UserError for ids outside the vocabulary."""
    (prompt,), (asked,) = request.prompts, request.samplings
    settings = sampling.stack_settings([asked], vocab_size, request.eos_ids)
    limit = len(prompt) + request.max_new_tokens
    known = (len(prompt), len(prompt), limit, asked.seed, adapter)
    return Row(
        tokens=list(prompt),
        prompt_length=len(prompt),
        limit=limit,
        adapter=adapter,
        active=asked.active,
        numbers=_numbers(known, settings),
        settings={name: settings[name] for name in ("banned", "logit_bias") if name in settings},
    )


def _numbers(known: Sequence[int], settings: Mapping[str, Any]) -> np.ndarray:
    """A row of `Batch.numbers`: those of `_COLUMNS`, the settings, and the end tokens."""
    parts: list[np.ndarray] = [np.array(known, np.uint32)]  # a seed needs all bits
    for name, default in _SETTINGS.items():
        dtype = np.int32 if isinstance(default, int) else np.float32
        parts.append(np.array(settings.get(name, default), dtype).reshape(1))
    ends = settings.get("eos_ids", ())
    filled = np.full(max(_ENDS, sampling.power_of_two(len(ends))), _NO_END, np.int32)
    filled[: len(ends)] = ends
    return np.concatenate([part.view(np.int32) for part in (*parts, filled)])


@functools.cache
def _idle_numbers(cache_slots: int) -> np.ndarray:
    """Of a row that a call must leave alone, to be read only."""
    return _numbers((cache_slots, 0, 0, 0, 0), {})


def stack_rows(rows: Sequence[Row | None], vocab_size: int, cache_slots: int) -> Batch:
    """The arguments for these rows; None is a row of the cache that a call must leave alone.

    It gets a length that lets it write its last slot only, which no text needs: the last token of a
    text is fed anew by each step.
    """
    count, known = len(rows), [row for row in rows if row]
    tokens = np.zeros((count, cache_slots + 2), np.int32)
    columns = max(len(row.numbers) for row in known)
    numbers = np.full((count, columns), _NO_END, np.int32)
    for i, row in enumerate(rows):
        own = row.numbers if row else _idle_numbers(cache_slots)
        numbers[i, : len(own)] = own
        if row:
            tokens[i, : len(row.tokens)] = row.tokens
            numbers[i, _COLUMNS.index("length")] = len(row.tokens)
    settings = {}
    if any("logit_bias" in row.settings for row in known):
        settings["logit_bias"] = np.zeros((count, vocab_size), np.float32)
        for i, row in enumerate(rows):
            if row and "logit_bias" in row.settings:
                settings["logit_bias"][i] = row.settings["logit_bias"][0]
    if any("banned" in row.settings for row in known):
        tables = [row.settings.get("banned") if row else None for row in rows]
        settings["banned"] = sampling.join_banned(tables)
    return Batch(tokens, numbers, settings)


def read_numbers(tokens: Array, numbers: Array) -> tuple[DecodeState, Array, dict[str, Array]]:
    """The state of `Batch.tokens` and `.numbers`, without cache and log-probabilities; the numbers
    of the rows' adapters; the settings that are a number for each row, and "eos_ids"."""
    column = dict(zip((*_COLUMNS, *_SETTINGS), numbers.T, strict=False))
    length, prompt_length, limit, seed, adapter = (column.pop(name) for name in _COLUMNS)
    settings = {"eos_ids": numbers[:, len(_COLUMNS) + len(_SETTINGS) :]}
    for name, default in _SETTINGS.items():
        dtype = jnp.int32 if isinstance(default, int) else jnp.float32
        settings[name] = jax.lax.bitcast_convert_type(column[name], dtype)
    state = DecodeState(
        tokens=tokens,
        length=length,
        prompt_length=prompt_length,
        limit=limit,
        generated=length - prompt_length,
        done=length >= limit,
        logprobs=jnp.zeros((len(tokens), 0)),
        seed=jax.lax.bitcast_convert_type(seed, jnp.uint32),
        copy=jnp.zeros(len(tokens), jnp.uint32),
    )
    return state, adapter, settings


def stack_adapters(models: Mapping[str, Any]) -> Any:
    """Of A adapters {"attn": {"qkv": {"a": [L, A + 1, r, D], "b": [L, A + 1, F, r]}}}.

    models: the base (number 0, whose part is zero) and the model of each adapter, by name. Lower
    ranks are filled with zeros. Raises UserError where an adapter is more than an addition.
    """
    (_, base), *others = models.items()
    known = dict(_leaves(base._weights))
    found: dict[Any, dict[int, list[np.ndarray]]] = {}  # by path and adapter: of each layer
    for number, (name, lm) in enumerate(others, 1):
        for path, leaf in _leaves(lm._weights):
            if known.get(path) is leaf:
                continue
            if path[0] != "blocks" or path[-1] not in ("lora_a", "lora_b"):
                raise UserError(
                    f"the adapter {name} changes {'/'.join(map(str, path))}: in slots an adapter "
                    "adds to layers and replaces nothing (no DoRA, no prompts, no other weights)"
                )
            is_apart = isinstance(path[1], int)  # a layer by itself
            layers = np.asarray(leaf, np.float32)
            layers = layers[None] if is_apart else layers
            kept = quantize.input_axes(str(path[-2])) if path[-1] == "lora_a" else 1
            matrices = layers.reshape(len(layers), int(np.prod(layers.shape[1 : kept + 1])), -1)
            place = path[1 + is_apart :]
            found.setdefault(place, {}).setdefault(number, []).extend(matrices.swapaxes(1, 2))
    stacked: dict[str, Any] = {}
    for path, by_adapter in found.items():
        part = stacked
        for name in path[:-1]:
            part = part.setdefault(name, {})
        axis = 0 if path[-1] == "lora_a" else 1  # of the rank
        known_layers = list(by_adapter.values())
        shape = list(known_layers[0][0].shape)
        shape[axis] = max(of_layers[0].shape[axis] for of_layers in known_layers)
        stack = np.zeros((len(known_layers[0]), len(others) + 1, *shape), np.float32)
        for number, of_layers in by_adapter.items():
            for layer, matrix in enumerate(of_layers):
                stack[layer, number, : matrix.shape[0], : matrix.shape[1]] = matrix
        part["a" if path[-1] == "lora_a" else "b"] = jnp.asarray(stack)
    return stacked


def _leaves(weights: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """(path, leaf): keys of dicts and numbers of tuples."""
    result = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        result.append((tuple(getattr(p, "key", getattr(p, "idx", None)) for p in path), leaf))
    return result


def text_length(model: Any, slots: int, length: int, whole: int) -> int:
    """Tokens that a text may have: `length`, or for 0 as many as 2 GiB of cache hold for all slots,
    a multiple of `whole`.

    Raises UserError.
    """
    config = model.config
    if not 0 <= length <= config.context:
        raise UserError(f"length = {length}: from 1 to the model's context of {config.context}")
    if length:
        return length
    itemsize = jnp.dtype(model.cache_dtype or config.dtype).itemsize
    token_bytes = 2 * config.layers * config.kv * config.head_width * itemsize
    most = _CACHE_BYTES // (token_bytes * slots) // whole * whole
    return min(config.context, max(most, whole))
