"""What the programs of `slots.SlotEngine` are told about their rows, on the host.

A `Row` is one text: tokens, limits, settings, key. `stack_rows` makes the arguments of a call of
them; `stack_adapters` puts the adapters of several models beside one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.generation import sampling
from gptjax.generation.loop import DecodeState
from gptjax.generation.requests import Request
from gptjax.model import quantize

_CACHE_BYTES = 2 << 30  # of keys and values, where the context would need more
_ENDS = 8  # end tokens of a row that any program has room for


@dataclasses.dataclass
class Row:
    """One text."""

    tokens: list[int]  # so far
    prompt_length: int
    limit: int  # the longest length
    seed: int
    active: frozenset[str]
    settings: dict[str, np.ndarray]  # each with one row; "eos_ids" [E]
    adapter: int


class Batch(NamedTuple):
    """The arguments of `slot_programs.decode` that change with every call."""

    state: DecodeState
    adapters: np.ndarray  # int32 [N]
    settings: dict[str, np.ndarray]
    shapes: tuple[Any, ...]  # of the settings whose shape depends on the texts


def build_row(request: Request, vocab_size: int, adapter: int) -> Row:
    """The row of a request for one text. Raises UserError for ids outside the vocabulary."""
    (prompt,), (asked,) = request.prompts, request.samplings
    return Row(
        tokens=list(prompt),
        prompt_length=len(prompt),
        limit=len(prompt) + request.max_new_tokens,
        seed=asked.seed,
        active=asked.active,
        settings=sampling.stack_settings([asked], vocab_size, request.eos_ids),
        adapter=adapter,
    )


def stack_rows(rows: Sequence[Row | None], vocab_size: int, cache_slots: int) -> Batch:
    """The arguments for these rows; None is a row of the cache that a call must leave alone.

    It gets a length that lets it write its last slot only, which no text needs: the last token of a
    text is fed anew by each step.
    """
    count = len(rows)
    tokens = np.zeros((count, cache_slots + 2), np.int32)
    length = np.full(count, cache_slots, np.int32)
    prompt_length, limit = np.zeros(count, np.int32), np.zeros(count, np.int32)
    seed, adapters = np.zeros(count, np.uint32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            tokens[i, : len(row.tokens)] = row.tokens
            length[i], prompt_length[i], limit[i] = len(row.tokens), row.prompt_length, row.limit
            seed[i], adapters[i] = row.seed, row.adapter
    settings = _join_settings([row.settings if row else None for row in rows], vocab_size)
    state: dict[str, Any] = dict(
        tokens=tokens,
        length=length,
        prompt_length=prompt_length,
        limit=limit,
        generated=length - prompt_length,
        done=length >= limit,
        logprobs=None,
        seed=seed,
        copy=np.zeros(count, np.uint32),
    )
    varying = ("eos_ids", "banned", "logit_bias")
    shapes = tuple(settings[name].shape if name in settings else () for name in varying)
    return Batch(DecodeState(**state), adapters, settings, shapes)


def _join_settings(
    rows: Sequence[Mapping[str, np.ndarray] | None], vocab_size: int
) -> dict[str, np.ndarray]:
    """Settings of a batch; what a row does not have changes nothing in it."""
    count, names = len(rows), set[str]().union(*(row or {} for row in rows))
    joined = {}
    for name, default in sampling.NUMBERS.items():
        if name == "seed":
            continue
        dtype = np.int32 if isinstance(default, int) else np.float32
        joined[name] = np.full(count, default, dtype)
        for i, row in enumerate(rows):
            if row is not None:
                joined[name][i] = row[name][0]
    if "logit_bias" in names:
        joined["logit_bias"] = np.zeros((count, vocab_size), np.float32)
    most = max((len(row["eos_ids"]) for row in rows if row), default=0)
    joined["eos_ids"] = np.full((count, max(_ENDS, sampling.power_of_two(most))), -1, np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            joined["eos_ids"][i, : len(row["eos_ids"])] = row["eos_ids"]
            if "logit_bias" in row:
                joined["logit_bias"][i] = row["logit_bias"][0]
    if "banned" in names:
        joined["banned"] = sampling.join_banned([(row or {}).get("banned") for row in rows])
    return joined


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
