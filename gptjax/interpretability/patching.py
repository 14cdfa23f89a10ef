"""What a part of the model carries: values of one prompt's run put into the run of another.

Activation patching (also causal tracing; Meng et al. 2022) runs the prompt `into` with a value of
the prompt `source` at one place, for every layer and position, or every head, and reads a logit (or
the difference of two): where it turns into that of `source` alone, the place carries what tells the
prompts apart. Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023) lets a part's other
value travel along direct paths only: all other heads are held at the values that they had.

Both prompts have the same number of tokens; a sweep runs many places as rows of one batch.
Dims: those of `model.transformer`; N places.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.requests import Prompt
from gptjax.generation.tracing import NO_LAYER, capture, computation, filler, padded
from gptjax.interpretability.attribution import check_pair
from gptjax.model import head

ROWS = 16  # places at a time
Part = tuple  # ("embedding",), ("mlp", layer) or ("head", layer, head)
Receiver = tuple[str, int, int]  # ("queries" | "keys" | "values", layer, head)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the logit (or the difference of two) becomes with each place patched.

    values: float32, of the places: [L, T], [L, H] or [N]. source, into: of the two prompts.
    """

    values: np.ndarray
    source: float
    into: float

    @property
    def restored(self) -> np.ndarray:
        """0 where a patch changes nothing, 1 where it gives the logit of the source."""
        return (self.values - self.into) / (self.source - self.into)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "chosen"], meta_fields=["name"]
)
@dataclasses.dataclass(frozen=True)
class Overlay:
    """An intervention that gives each row of the batch its own places.

    values: [L, B or 1, ...], dims of `name`; chosen: bool [L, B, ...], of the same axes or 1. Of
    names without a layer L = 1.
    """

    name: str
    values: Any
    chosen: Any

    def __call__(self, name: str, value: Array, layer: int) -> Array:
        if name != self.name:
            return value
        return jnp.where(self.chosen[max(layer, 0)], self.values[max(layer, 0)], value)


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Both prompts, ready to be run with parts of one another."""

    config: ModelConfig
    params: Params
    tokens: np.ndarray  # int32 [2, T]: source, into
    length: int
    position: np.int32  # where the logit is read
    pair: np.ndarray
    factors: np.ndarray

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        source: Prompt,
        into: Prompt,
        target: int,
        against: int | None,
        position: int,
    ) -> _Runs:
        rows = [lm.encode(prompt) for prompt in (source, into)]
        if len(rows[0]) != len(rows[1]):
            raise UserError(
                f"the prompts have {len(rows[0])} and {len(rows[1])} tokens: patching needs two "
                "of equal length"
            )
        config, params = computation(lm)
        place = np.int32(range(len(rows[0]))[position])
        pair, factors = check_pair(lm, target, against)
        return cls(config, params, padded(lm, rows), len(rows[0]), place, pair, factors)

    def values(self, names: Sequence[str]) -> tuple[dict[str, Array], np.ndarray]:
        """({name: [L, 2, ...]} of both prompts, their logits [2])"""
        logits, values = self._run(self.tokens, (), tuple(names))
        for name in NO_LAYER:
            if name in values:
                values[name] = values[name][None]
        return values, np.asarray(logits)

    def sweep(
        self, changes: Sequence[Sequence[Overlay]], shape: tuple[int, int], logits: np.ndarray
    ) -> Sweep:
        """Of `into`, with the interventions of each batch of `ROWS` places. logits: of both."""
        swept = np.concatenate([np.asarray(self.of_batch(batch)[0]) for batch in changes])
        values = swept[: math.prod(shape)].reshape(shape)
        return Sweep(values, float(logits[0]), float(logits[1]))

    def of_batch(
        self, changes: Sequence[Overlay], names: tuple[str, ...] = ()
    ) -> tuple[Array, dict[str, Array]]:
        tokens_BT = np.repeat(self.tokens[1:], ROWS, axis=0)
        return self._run(tokens_BT, tuple(changes), names)

    def _run(self, tokens_BT: np.ndarray, changes: tuple, names: tuple[str, ...]) -> Any:
        place = (self.position, self.pair, self.factors)
        return _run(self.config, self.params, tokens_BT, changes, *place, names=names)


@functools.partial(jax.jit, static_argnames=("config", "names"))
def _run(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    changes: Sequence[Any],
    position: Array,
    pair: Array,
    factors: Array,
    *,
    names: tuple[str, ...],
) -> tuple[Array, dict[str, Array]]:
    """(logits [B] at a position, {name: value})"""
    values = capture(config, params, tokens_BT, changes, names=(*names, "final_norm"))
    last_BD = values["final_norm"][:, position]
    logits_B = head.unembed(config, params, last_BD)[:, pair] @ factors
    return logits_B, {name: values[name] for name in names}


def batches_of(places: np.ndarray) -> list[np.ndarray]:
    """Rows of places [N, ...], `ROWS` at a time; the last batch is filled with none."""
    filled = np.zeros((-(-len(places) // ROWS) * ROWS, *places.shape[1:]), places.dtype)
    filled[: len(places)] = places
    return np.split(filled, len(filled) // ROWS)


def patch_positions(
    lm: LanguageModel,
    source: Prompt,
    into: Prompt,
    target: int,
    *,
    against: int | None = None,
    position: int = -1,
    name: str = "residual",
) -> Sweep:
    """Activation patching at each layer and position: values [L, T].

    target, against, position: the logit that is read (less another), and where. name: what is
    patched: residual, attention_output, mlp_output or another value [L, B, T, ...] of
    `tracing.DIMS`. Raises UserError for prompts of different lengths.
    """
    runs = _Runs.of(lm, source, into, target, against, position)
    values, logits = runs.values([name])
    layers, _, time, *rest = values[name].shape
    if name in NO_LAYER or filler(name) or name == "pattern":
        raise ValueError(f"{name!r} has no layers and positions to patch one by one")
    count = layers * runs.length
    chosen = np.zeros((count, layers, time), bool)
    places = np.arange(count)
    chosen[places, places // runs.length, places % runs.length] = True
    batches = []
    for batch in batches_of(chosen):
        mask = batch.swapaxes(0, 1).reshape(layers, ROWS, time, *[1] * len(rest))
        batches.append([Overlay(name, values[name][:, :1], mask)])
    return runs.sweep(batches, (layers, runs.length), logits)


def patch_heads(
    lm: LanguageModel,
    source: Prompt,
    into: Prompt,
    target: int,
    *,
    against: int | None = None,
    position: int = -1,
) -> Sweep:
    """Activation patching of what each head read, at all positions: values [L, H]."""
    runs = _Runs.of(lm, source, into, target, against, position)
    values, logits = runs.values(["heads"])
    layers, heads = len(values["heads"]), lm.config.heads
    batches = []
    for batch in batches_of(each_head(layers, heads)):
        batches.append([Overlay("heads", values["heads"][:, :1], of_heads(batch))])
    return runs.sweep(batches, (layers, heads), logits)


def each_head(layers: int, heads: int) -> np.ndarray:
    """bool [N, L, H]: one head at each place."""
    return np.eye(layers * heads, dtype=bool).reshape(-1, layers, heads)


def of_heads(chosen_BLH: np.ndarray) -> np.ndarray:
    """[L, B, 1, H, 1], for values [L, B, T, H, C]."""
    return chosen_BLH.swapaxes(0, 1)[:, :, None, :, None]


def patch_paths(
    lm: LanguageModel,
    source: Prompt,
    into: Prompt,
    target: int,
    *,
    against: int | None = None,
    position: int = -1,
    senders: Sequence[Sequence[Part]] | None = None,
    receivers: Sequence[Receiver] = (),
    freeze_mlps: bool = False,
) -> Sweep:
    """Path patching: what senders write reaches the receivers, and nothing else, directly.

    senders: at each place parts that get their values of `source`: ("embedding",), ("mlp", layer),
        ("head", layer, head); None: every head by itself, values [L, H].
    receivers: ("queries", layer, head), or "keys" or "values" of a key/value head; none: the
        logits. What they would become, with all heads but the senders held at their values of
        `into`, is put into a run in which everything else follows freely.
    freeze_mlps: hold MLPs too; else they are parts of the paths (Wang et al. 2022).

    Raises UserError for prompts of different lengths.
    """
    runs = _Runs.of(lm, source, into, target, against, position)
    names = ("embedding", "heads", "mlp_output")
    values, logits = runs.values(names)
    layers, heads = lm.config.layers, lm.config.heads
    if senders is None:
        each = [[("head", i, j)] for i in range(layers) for j in range(heads)]
    else:
        each = [list(parts) for parts in senders]
    embedding_N, heads_NLH, mlps_NL = _sender_masks(each, layers, heads)
    kept = {name: value[:, 1:] for name, value in values.items()}
    given = {name: value[:, :1] for name, value in values.items()}
    frozen = [Overlay("heads", kept["heads"], np.ones((layers, 1, 1, 1, 1), bool))]
    if freeze_mlps:
        held = np.ones((layers, 1, 1, 1), bool)
        frozen.append(Overlay("mlp_output", kept["mlp_output"], held))
    swept = []
    for embeddings_B, heads_BLH, mlps_BL in zip(
        *map(batches_of, (embedding_N, heads_NLH, mlps_NL)), strict=True
    ):
        sent = [
            Overlay("embedding", given["embedding"], embeddings_B[None, :, None, None]),
            Overlay("heads", given["heads"], of_heads(heads_BLH)),
            Overlay("mlp_output", given["mlp_output"], mlps_BL.T[:, :, None, None]),
        ]
        points = tuple(sorted({name for name, _, _ in receivers}))
        of_rows, received = runs.of_batch([*frozen, *sent], points)
        if receivers:
            of_rows, _ = runs.of_batch(_received(receivers, received))
        swept.append(np.asarray(of_rows))
    all_values = np.concatenate(swept)[: len(each)]
    if senders is None:
        all_values = all_values.reshape(layers, heads)
    return Sweep(all_values, float(logits[0]), float(logits[1]))


def _sender_masks(
    senders: Sequence[Sequence[Part]], layers: int, heads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [N], [N, L, H] and [N, L]: whether embedding, heads and MLPs send."""
    count = len(senders)
    embedding, mlps = np.zeros(count, bool), np.zeros((count, layers), bool)
    head_masks = np.zeros((count, layers, heads), bool)
    for i, parts in enumerate(senders):
        for kind, *place in parts:
            if kind == "embedding":
                embedding[i] = True
            elif kind == "mlp":
                mlps[i, *place] = True
            elif kind == "head":
                head_masks[i, *place] = True
            else:
                raise ValueError(f"a sender {kind!r}: there are embedding, mlp and head")
    return embedding, head_masks, mlps


def _received(receivers: Sequence[Receiver], values: dict[str, Array]) -> list[Overlay]:
    """Interventions that give the receivers what they received."""
    overlays = []
    for name, value in values.items():
        layers, _, _, heads, _ = value.shape
        chosen = np.zeros((1, layers, heads), bool)
        for point, layer, number in receivers:
            if point == name:
                chosen[0, layer, number] = True
        overlays.append(Overlay(name, value, of_heads(chosen)))
    return overlays
