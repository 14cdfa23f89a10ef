"""Where a logit comes from: the parts of the model that write it, and the tokens that it is due to.

`direct_logits` splits a logit, or the difference of two, into what each part adds to the residual
stream (Elhage et al. 2021, "direct logit attribution"): the last state is a sum of embedding, heads
and MLPs, and the final norm, with its divisor taken as given, is linear. `token_attribution` asks
what the tokens contributed, by the gradient times the input, or by integrated gradients along the
straight line from a baseline (Sundararajan et al. 2017, equation 1), whose scores add up to the
difference that the prompt makes (their axiom of completeness).
Dims: those of `model.transformer`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Params
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.requests import Prompt
from gptjax.generation.tracing import Trace, computation, output_kernel, padded
from gptjax.model import head, transformer
from gptjax.model.embed import embed
from gptjax.model.quantize import block_of
from gptjax.ops import quantized
from gptjax.ops.activation import softcap

METHODS = ("gradient", "integrated")
_NODES, _WEIGHTS = (x / 2 for x in np.polynomial.legendre.leggauss(3))  # on [-1/2, 1/2]
_COMPLETE = 0.01  # integrated gradients take more steps until the scores are so complete,


@dataclasses.dataclass(frozen=True)
class DirectLogits:
    """What each part adds to a logit (or to the difference of two), in the units of the logit.

    heads: float32 [L, H]; attention_bias, mlp: float32 [L]. norm_bias: of the final norm.
    """

    logit: float
    embedding: float
    heads: np.ndarray
    attention_bias: np.ndarray
    mlp: np.ndarray
    norm_bias: float

    @property
    def layers(self) -> np.ndarray:
        """float32 [L]: what attention and MLP of each layer add."""
        return self.heads.sum(1) + self.attention_bias + self.mlp

    @property
    def total(self) -> float:
        """The sum of all parts, which is the logit up to rounding."""
        return float(self.embedding + self.layers.sum() + self.norm_bias)

    def rows(self) -> Iterator[tuple[str, float]]:
        """(name, value) of every part, in the order of the forward pass."""
        yield "embedding", self.embedding
        for layer, heads in enumerate(self.heads):
            for number, value in enumerate(heads):
                yield f"layer {layer}, head {number}", float(value)
            yield f"layer {layer}, attention bias", float(self.attention_bias[layer])
            yield f"layer {layer}, MLP", float(self.mlp[layer])
        yield "final norm's bias", self.norm_bias


def direct_logits(
    lm: LanguageModel,
    trace: Trace,
    target: int,
    *,
    against: int | None = None,
    position: int = -1,
) -> DirectLogits:
    """The logit of `target` after a position (less that of `against`) by the parts that write it.

    Post norms and the cap of the logits (Gemma 2) are taken as given too: their divisor, and the
    ratio of the capped logit to the other.
    """
    config, params = computation(lm)
    values = {name: trace[name][:, position] for name in ("heads", "mlp_output")}
    values |= {name: trace[name][position] for name in ("embedding",)}
    values["last"] = trace["residual_after"][-1, position]
    parts = _direct(config, params, values, *check_pair(lm, target, against))
    logit, embedding, norm_bias = (float(parts[n]) for n in ("logit", "embedding", "norm_bias"))
    heads, bias, mlp = (np.asarray(parts[n]) for n in ("heads", "attention_bias", "mlp"))
    return DirectLogits(logit, embedding, heads, bias, mlp, norm_bias)


def check_pair(
    lm: LanguageModel, target: int, against: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(two tokens, the factors of their logits). Raises UserError for one that is not there."""
    tokens = [target, target if against is None else against]
    for token in tokens:
        if not 0 <= token < lm.config.vocab_size:
            raise UserError(f"token {token} is outside the vocabulary of {lm.config.vocab_size:,}")
    factors = np.asarray([1, 0 if against is None else -1], np.float32)
    return np.asarray(tokens, np.int32), factors


@functools.partial(jax.jit, static_argnames="config")
def _direct(
    config: ModelConfig, params: Params, values: dict[str, Array], pair: Array, factors: Array
) -> dict[str, Array]:
    norm = _FrozenNorm.of(config, params["final_norm"], values["last"])
    rows_2D = _table_rows(params, pair)
    raw_2 = rows_2D @ (norm.linear(values["last"]) + norm.bias)
    logits_2 = softcap(raw_2, config.logit_softcap)
    # near 0 the cap is the identity
    ratio_2 = jnp.where(jnp.abs(raw_2) > 1e-6, logits_2 / raw_2, 1.0)
    direction_D = (factors * ratio_2) @ rows_2D

    heads, biases = [], []
    for layer in range(config.layers):
        block = block_of(params, layer)
        kernel_HCD = output_kernel(config, params, layer)
        results_HD = jnp.einsum("HC,HCD->HD", values["heads"][layer], kernel_HCD)
        bias_D = block["attn"]["out"].get("bias", jnp.zeros(config.width))
        after = jnp.zeros(config.width)
        if config.post_norms:
            post = _FrozenNorm.of(config, block["post_norm1"], results_HD.sum(0) + bias_D)
            results_HD, bias_D = post.linear(results_HD), post.linear(bias_D)
            after = post.bias
        heads.append(norm.linear(results_HD) @ direction_D)
        biases.append(norm.linear(bias_D + after) @ direction_D)
    return {
        "logit": factors @ logits_2,
        "embedding": norm.linear(values["embedding"]) @ direction_D,
        "heads": jnp.stack(heads),
        "attention_bias": jnp.stack(biases),
        "mlp": norm.linear(values["mlp_output"]) @ direction_D,
        "norm_bias": norm.bias @ direction_D,
    }


@dataclasses.dataclass(frozen=True)
class _FrozenNorm:
    """A norm whose divisor is that of one vector: a linear map, and a bias [D]."""

    factor: Array  # [D]
    center: bool
    bias: Array

    @classmethod
    def of(cls, config: ModelConfig, params: Params, x_D: Array) -> _FrozenNorm:
        center = config.norm == "layernorm"
        centered = x_D - x_D.mean() if center else x_D
        scale = params["scale"] + 1 if config.norm_plus_one else params["scale"]
        factor = scale * jax.lax.rsqrt((centered * centered).mean() + config.norm_eps)
        return cls(factor, center, params.get("bias", jnp.zeros(config.width)))

    def linear(self, x: Array) -> Array:
        x = x - x.mean(-1, keepdims=True) if self.center else x
        return x * self.factor


def _table_rows(params: Params, tokens: Array) -> Array:
    """float32 [..., D]: the rows of the output table for these tokens."""
    return quantized.lookup(params["head"] if "head" in params else params["embed"], tokens)


@dataclasses.dataclass(frozen=True)
class TokenAttribution:
    """scores: float32 [T], what each token of the prompt contributed, in the units of the logit.

    logit: of the prompt. baseline: with integrated gradients the logit of the baseline; scores add
    up to logit - baseline. error: |their sum - that| / |that|; steps: gradients that were taken.
    """

    scores: np.ndarray
    logit: float
    baseline: float = 0.0
    error: float = 0.0
    steps: int = 1


def token_attribution(
    lm: LanguageModel,
    prompt: Prompt,
    target: int,
    *,
    against: int | None = None,
    position: int = -1,
    method: str = "integrated",
    steps: int = 32,
    most_steps: int = 1024,
) -> TokenAttribution:
    """What each token contributed to the logit of `target` (less that of `against`).

    method: gradient, that with respect to the embeddings times the embeddings; integrated, its mean
        along the line from a baseline, times the distance. The baseline has the mean of all
        embeddings in place of every token; positions stay.
    steps: points of the line to begin with. A deep model jumps on it, so the piece whose gradients
        agree least with its ends is halved until the scores are complete within 1 %.
    most_steps: so many points in all are enough: see `error` of the result.

    Raises UserError.
    """
    if method not in METHODS:
        raise UserError(unknown_name("method", method, list(METHODS)))
    config, params = computation(lm)
    ids = lm.encode(prompt)
    tokens_1T = padded(lm, [ids])
    place = np.int32(range(len(ids))[position])
    inputs, baselines = map(np.asarray, _embeddings(config, params, tokens_1T))
    pair = check_pair(lm, target, against)

    def look(points: Sequence[float], way: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(logits [N], gradients times `way` [N, T]) at points of the line."""
        line = inputs + (np.asarray(points, np.float32)[:, None, None] - 1) * (inputs - baselines)
        logits, scores = _gradients(config, params, tokens_1T, line, way, place, *pair)
        return np.asarray(logits), np.asarray(scores)[:, : len(ids)]

    if method == "gradient":
        logits, scores = look([1.0], inputs)
        return TokenAttribution(scores[0], float(logits[0]))
    way = inputs - baselines
    logits, _ = look([0.0, 1.0] * 4, way)
    return _integrate(lambda points: look(points, way), logits[0], logits[1], steps, most_steps)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A piece of the line, with what the logit does between its ends and what gradients say."""

    start: float
    end: float
    logits: tuple[float, float]
    scores: np.ndarray  # [T]

    @property
    def error(self) -> float:
        return float(self.scores.sum()) - (self.logits[1] - self.logits[0])


def _integrate(
    look: Callable[..., Any], first: float, last: float, steps: int, most_steps: int
) -> TokenAttribution:
    """The integral of the gradients over the line, by Gauss and Legendre's rule in each piece."""
    pieces: list[_Piece] = []

    def add(start: float, end: float, logit: float) -> None:
        """Two pieces, the halves of [start, end], whose logit at the start is known."""
        middle, length = (start + end) / 2, (end - start) / 2
        nodes = [*(start + (0.5 + _NODES) * length), *(middle + (0.5 + _NODES) * length)]
        logits, scores = look([*nodes, middle, end])
        halves = (_WEIGHTS @ scores[:3] * length, _WEIGHTS @ scores[3:6] * length)
        pieces.append(_Piece(start, middle, (logit, float(logits[6])), halves[0]))
        pieces.append(_Piece(middle, end, (float(logits[6]), float(logits[7])), halves[1]))

    count = max(steps // 8, 1)
    for i in range(count):
        add(i / count, (i + 1) / count, pieces[-1].logits[1] if pieces else float(first))
    change = float(last - first)
    while True:
        error = abs(sum(piece.error for piece in pieces)) / max(abs(change), 1e-9)
        taken = 4 * len(pieces)
        if error <= _COMPLETE or taken >= most_steps:
            scores = np.sum([piece.scores for piece in pieces], 0)
            return TokenAttribution(scores, float(last), float(first), error, taken)
        worst = max(pieces, key=lambda piece: abs(piece.error))
        pieces.remove(worst)
        add(worst.start, worst.end, worst.logits[0])


@functools.partial(jax.jit, static_argnames="config")
def _embeddings(config: ModelConfig, params: Params, tokens_1T: Array) -> tuple[Array, Array]:
    """What enters the first block [T, D], and the same with a mean vector for every token."""
    positions = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    inputs_TD = embed(config, params, tokens_1T, positions)[0]
    vectors_VD = embed(config, params, jnp.arange(config.vocab_size))
    baselines_TD = inputs_TD - embed(config, params, tokens_1T)[0] + vectors_VD.mean(0)
    return inputs_TD, baselines_TD


@functools.partial(jax.jit, static_argnames="config")
def _gradients(
    config: ModelConfig,
    params: Params,
    tokens_1T: Array,
    embeddings_BTD: Array,
    way_TD: Array,
    position: Array,
    pair: Array,
    factors: Array,
) -> tuple[Array, Array]:
    """Logits [B] of embeddings, and for each position their gradients times a way [B, T]."""
    tokens_BT = jnp.broadcast_to(tokens_1T, embeddings_BTD.shape[:2])

    def logits(embeddings_BTD: Array) -> tuple[Array, Array]:
        def hook(name: str, value: Array, layer: int) -> Array:
            return embeddings_BTD if name == "embedding" else value

        x_BTD, _ = transformer.apply(config, params, tokens_BT, hook=hook)
        logits_B = head.unembed(config, params, x_BTD[:, position])[:, pair] @ factors
        return logits_B.sum(), logits_B

    grads_BTD, logits_B = jax.grad(logits, has_aux=True)(embeddings_BTD)
    return logits_B, jnp.einsum("BTD,TD->BT", grads_BTD, way_TD)
