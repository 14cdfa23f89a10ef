"""What arises inside a model on its way over a prompt, and what happens when some of it is changed.

    trace = lm.trace("The capital of France is")
    trace["residual"]  # float32 [L, T, D]; `HOOK_POINTS` has the names and dims
    trace.texts, trace["logits"][-1]

    lm.trace("The capital of France is", interventions=[ablate_head(5, 1)])["logits"]

An intervention is a pure function `change(name, value, layer) -> value` of JAX arrays; `value` has
an axis for the prompts of the call (`HOOK_POINTS`), and positions behind their ends. One that JAX
knows as a pytree, such as those made here, compiles nothing anew when its numbers change.

The computation is that of the reference in float32, with the weights as they are stored; it can be
differentiated. To trace something else, add a call to `model.transformer` and a row to its
`HOOK_POINTS`.
Dims: those of `model.transformer`; N prompts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array, Hook, Params
from gptjax.generation import requests
from gptjax.generation.requests import Prompt
from gptjax.generation.scoring import bucket
from gptjax.model import head, transformer
from gptjax.model.layers import Linear
from gptjax.model.quantize import block_of
from gptjax.ops.attention.mask import MASKED

if TYPE_CHECKING:
    from gptjax.generation.language_model import LanguageModel

# Besides `transformer.HOOK_POINTS`: what is computed from the values there.
DERIVED = {
    "head_results": "BTHD",  # what each head adds to the sum of heads; not kept unless asked for
    "logits": "BTV",
}
DIMS = transformer.HOOK_POINTS | DERIVED
DEFAULT_NAMES = tuple(name for name in DIMS if name != "head_results")
NO_LAYER = ("embedding", "final_norm", "logits")


@dataclasses.dataclass(frozen=True)
class Trace(Mapping[str, np.ndarray]):
    """The values of one prompt: `trace[name]`, float32, with the dims that `DIMS` gives for the
    name, without B, and with the layers [L] first where each has one.

    tokens: int32 [T]. texts: what each token stands for; without a tokenizer its number.
    """

    tokens: np.ndarray
    texts: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.arrays:
            return self.arrays[name]
        if name in DIMS:
            raise KeyError(f"{name} was not kept: ask for it in names")
        raise KeyError(unknown_name("value", name, list(DIMS)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays


@overload
def trace(  # type: ignore[overload-overlap]  # a str is a Sequence[str] as well
    lm: LanguageModel,
    prompts: str | Sequence[int] | np.ndarray,
    *,
    names: Sequence[str] = ...,
    interventions: Sequence[Hook] = ...,
) -> Trace: ...


@overload
def trace(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    names: Sequence[str] = ...,
    interventions: Sequence[Hook] = ...,
) -> list[Trace]: ...


def trace(
    lm: LanguageModel,
    prompts: Any,
    *,
    names: Sequence[str] = DEFAULT_NAMES,
    interventions: Sequence[Hook] = (),
) -> Trace | list[Trace]:
    """The `Trace` of a prompt (a text or ids), or one for each of a list of prompts.

    names: which values are kept, of `tracing.DIMS`; by default all but head_results. All of a
        prompt of T tokens take about 4 L T (2 H T + 8 D + 2 F) bytes.
    interventions: functions `change(name, value, layer) -> value` that are called one after the
        other wherever a value arises, and may replace it; see the top of `generation/tracing.py`.

    Raises UserError.

    >>> trace = lm.trace("The quick")
    >>> trace["pattern"].shape, trace.texts[:3]
    ((1, 2, 9, 9), ('T', 'h', 'e'))
    """
    for name in names:
        if name not in DIMS:
            raise UserError(unknown_name("value", name, list(DIMS)))
    listed = requests.list_prompts(prompts)
    rows = [lm.encode(prompt) for prompt in listed]
    config, params = computation(lm)
    changes = tuple(map(as_pytree, interventions))
    values = _captured(config, params, padded(lm, rows), changes, names=tuple(names))
    host = {name: np.asarray(value) for name, value in values.items()}
    traces = []
    for i, row in enumerate(rows):
        own = {name: _of_row(name, value, i, len(row)) for name, value in host.items()}
        traces.append(Trace(np.asarray(row, np.int32), token_texts(lm, row), own))
    is_single = isinstance(prompts, str) or isinstance(prompts[0], int | np.integer)
    return traces[0] if is_single else traces


def computation(lm: LanguageModel) -> tuple[ModelConfig, Params]:
    """(config, parameters) of a model for `capture`: the reference, in float32.

    Raises UserError for a classifier.
    """
    lm._require_text_model()
    config = dataclasses.replace(
        lm._inference_config, dtype="float32", implementation="reference", attention="reference"
    )
    return config, lm._weights


def padded(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [N, T]: rows of ids, with zeros behind their ends, of few lengths T.

    Raises UserError for a row longer than the context.
    """
    longest, context = max(map(len, rows)), lm.config.context
    if longest > context:
        raise UserError(
            f"a prompt has {longest} tokens and the model's context is {context}: shorten it"
        )
    tokens = np.zeros((len(rows), bucket(longest, context, smallest=16)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def token_texts(lm: LanguageModel, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token stands for by itself; without a tokenizer its number."""
    tokenizer = lm.tokenizer
    return tuple(str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids)


def _of_row(name: str, value: np.ndarray, row: int, length: int) -> np.ndarray:
    """Of a value of all prompts, that of one: up to its length on the axes of time."""
    of_layers = (slice(None),) * (name not in NO_LAYER)
    cut = tuple(slice(length) if dim in "TS" else slice(None) for dim in DIMS[name][1:])
    return value[(*of_layers, row, *cut)]


def capture(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    interventions: Sequence[Hook] = (),
    *,
    names: Sequence[str],
) -> dict[str, Array]:
    """{name: value} of a forward pass, values of each layer stacked on a first axis.

    Not jitted, for use inside of what is. config, params: of `computation`.
    """
    values: dict[str, list[Array]] = {name: [] for name in names}

    def hook(name: str, value: Array, layer: int) -> Array:
        for change in interventions:
            value = change(name, value, layer)
        if name in values:
            values[name].append(value)
        if name == "heads" and "head_results" in values:
            kernel_HCD = output_kernel(config, params, layer)
            result = jnp.einsum("BTHC,HCD->BTHD", value, kernel_HCD)
            values["head_results"].append(result)
        return value

    x_BTD, _ = transformer.apply(config, params, tokens_BT, hook=hook)
    if "logits" in values:
        hook("logits", head.unembed(config, params, x_BTD), -1)
    return {
        name: of_name[0] if name in NO_LAYER else jnp.stack(of_name)
        for name, of_name in values.items()
    }


_captured = functools.partial(jax.jit, static_argnames=("config", "names"))(capture)


def output_kernel(config: ModelConfig, params: Params, layer: int) -> Array:
    """float32 [H, C, D]: what turns the heads of a layer into its attention, adapters included."""
    width = config.heads * config.head_width
    units = jnp.eye(width).reshape(width, config.heads, config.head_width)
    linear: Any = Linear(config, (config.width,), inputs=2)
    out = block_of(params, layer)["attn"]["out"]
    kernel = linear.apply({"params": out}, units)
    return kernel.reshape(config.heads, config.head_width, config.width)


def as_pytree(change: Hook) -> Any:
    """An intervention as `jax.jit` takes it: a pytree as it is, another function as a constant."""
    leaves = jax.tree.leaves(change)
    return jax.tree_util.Partial(change) if len(leaves) == 1 and leaves[0] is change else change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _HeadAblation:
    layer: Any  # int32 []
    head: Any  # int32 []
    value: Any  # float32 [C] or []

    def __call__(self, name: str, value: Array, layer: int) -> Array:
        if name != "heads":
            return value
        here = (jnp.arange(value.shape[2]) == self.head) & (self.layer == layer)
        return jnp.where(here[None, None, :, None], self.value, value)


def ablate_head(layer: int, head: int, *, mean: Sequence[Trace] = ()) -> Hook:
    """An intervention: a head reads nothing, or, with traces, the mean of what it read in them."""
    value: np.ndarray = np.zeros((), np.float32)
    if mean:
        value = np.concatenate([trace["heads"][layer, :, head] for trace in mean]).mean(0)
    return _HeadAblation(np.int32(layer), np.int32(head), value)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layer", "source", "chosen"],
    meta_fields=["name"],
)
@dataclasses.dataclass(frozen=True)
class _Patch:
    name: str
    layer: Any  # int32 []
    source: Any  # float32, of one layer and row, its axes of time padded
    chosen: Any  # bool [T]

    def __call__(self, name: str, value: Array, layer: int) -> Array:
        if name != self.name:
            return value
        source = jnp.asarray(self.source)
        for axis, dim in enumerate(DIMS[name][1:]):
            if dim in "TS":
                source = _resized(source, axis, value.shape[axis + 1], filler(name))
        axis = time_axis(name)
        chosen = _resized(jnp.asarray(self.chosen), 0, value.shape[axis], False) & (
            self.layer == layer
        )
        after = [1] * (value.ndim - axis - 1)
        return jnp.where(chosen.reshape(-1, *after), source, value)


def time_axis(name: str) -> int:
    """The axis of a value (one with a batch) on which its positions stand."""
    return DIMS[name].index("T")


def filler(name: str) -> float:
    """What stands behind the end of a prompt in its values: keys there must not be seen."""
    return MASKED if name == "scores" else 0.0


def _resized(x: Array, axis: int, length: int, fill: Any) -> Array:
    """x, cut or filled to a length."""
    x = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
    padding = [(0, length - x.shape[i] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding, constant_values=fill)


def patch(
    source: Trace, name: str, layer: int | None = None, positions: Sequence[int] | None = None
) -> Hook:
    """An intervention: the value of another run stands in for that of this one, for every prompt.

    layer: of names that each layer has; None for the others (`NO_LAYER`). positions: of the queries
    for scores and pattern; None: all that the source has.
    """
    if name == "head_results":
        raise ValueError("head_results are computed aside: patch heads")
    if (layer is None) != (name in NO_LAYER):
        raise ValueError(f"patch of {name!r}: layer = {layer} must be {_layer_rule(name)}")
    value = source[name] if layer is None else source[name][layer]
    length = len(source.tokens)
    chosen = np.zeros(length, bool)
    chosen[list(range(length) if positions is None else positions)] = True
    size = bucket(length, 1 << 30, smallest=16)  # few sizes, so few programs
    padding = [(0, size - length if dim in "TS" else 0) for dim in DIMS[name][1:]]
    padding += [(0, 0)] * (value.ndim - len(padding))  # gate and up
    return _Patch(
        name,
        np.int32(-1 if layer is None else layer),
        np.pad(value, padding, constant_values=filler(name)),
        np.pad(chosen, (0, size - length)),
    )


def _layer_rule(name: str) -> str:
    return "None: it belongs to no layer" if name in NO_LAYER else "a layer's number"
