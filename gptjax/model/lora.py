"""Adapters: small trained parameters next to frozen ones, as pure functions on nested dicts.

`init` makes them, `apply_adapter` puts them where the model's layers look for them, `merge` adds
them into the kernels. The adapter of a layer lies next to its kernel [L, *in, *out]:

    lora_a [L, *in, r], lora_b [L, r, *out]; with DoRA also lora_m [L, *out]

The update of a kernel W is (alpha / r) A B (Hu et al. 2021, section 4.1). DoRA turns the kernel
into m (W + update) / |W + update|, the norm taken over inputs (Liu et al. 2024, equation 5).
Prompt tuning adds embed/prompt [P, D].
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig, ModelConfig
from gptjax.core import tree
from gptjax.core.types import Array, Params
from gptjax.model import init as model_init
from gptjax.model import quantize
from gptjax.model.embed import embed
from gptjax.ops.unstack import unstack

Shape = tuple[int, ...]


def targets(lora: LoraConfig, shapes: dict[str, Shape]) -> dict[str, tuple[Shape, Shape]]:
    """{path of a layer that gets an adapter: (input axes, output axes) of its kernel}.

    shapes: as `init.kernel_shapes` gives them. Raises UserError for a pattern without a match.
    """
    kernels = {}
    for path, shape in shapes.items():
        if path.startswith("blocks/") and path.endswith("/kernel"):
            kernels[path.removesuffix("/kernel")] = shape
    for pattern in lora.targets:
        is_default = pattern in LoraConfig().targets
        if not is_default and not any(tree.matches([pattern], path) for path in kernels):
            raise UserError(
                f"lora.targets: {pattern!r} matches no layer; there are {', '.join(kernels)}"
            )
    result = {}
    for path, shape in kernels.items():
        if tree.matches(lora.targets, path):
            inputs = quantize.input_axes(path)
            result[path] = (shape[:inputs], shape[inputs:])
    return result


def init(config: ModelConfig, lora: LoraConfig, key: Array, base: Params) -> Params:
    """New adapters with which the model computes what its base does; float32.

    A is uniform within 1 / sqrt(inputs), B is zero; prompts start as embeddings of random tokens.
    base: the model's params (only DoRA's magnitudes and prompts need them).
    """
    flat: dict[str, Array] = {}
    if lora.rank:
        layers = targets(lora, model_init.kernel_shapes(config))
        for i, (path, (in_shape, out_shape)) in enumerate(layers.items()):
            bound = 1 / math.sqrt(math.prod(in_shape))
            flat[f"{path}/lora_a"] = jax.random.uniform(
                jax.random.fold_in(key, i),
                (config.layers, *in_shape, lora.rank),
                minval=-bound,
                maxval=bound,
            )
            flat[f"{path}/lora_b"] = jnp.zeros((config.layers, lora.rank, *out_shape))
            if lora.dora:
                kernel = tree.flatten(base)[f"{path}/kernel"].astype(jnp.float32)
                flat[f"{path}/lora_m"] = _input_norm(kernel, len(in_shape))
    if lora.prompt_tokens:
        prompt_key = jax.random.fold_in(key, 1 << 20)
        ids = jax.random.randint(prompt_key, (lora.prompt_tokens,), 0, config.vocab_size)
        flat["embed/prompt"] = embed(config, base, ids).astype(jnp.float32)
    return tree.nested(flat)


def _input_norm(kernel: Array, inputs: int) -> Array:
    """Length of each output's weights: [L, *in, *out] -> [L, *out]."""
    return jnp.sqrt(jnp.square(kernel).sum(tuple(range(1, 1 + inputs))))


def update(lora: LoraConfig, adapter: Params) -> Array:
    """(alpha / r) A B of one layer's adapter, in the kernel's shape [L, *in, *out]."""
    a, b = adapter["lora_a"], adapter["lora_b"]
    a_LIR = a.reshape(len(a), -1, a.shape[-1])
    b_LRO = b.reshape(len(b), b.shape[1], -1)
    product = jnp.einsum("Lir,Lro->Lio", a_LIR, b_LRO)
    return lora.scale * product.reshape(*a.shape[:-1], *b.shape[2:])


def apply_adapter(
    lora: LoraConfig, frozen: Params, trained: Params, *, dropout: bool = False
) -> Params:
    """The complete model's parameters: `frozen`, with `trained` where both have a leaf.

    frozen: blocks stacked on axis 0 or a tuple; {} if all is trained.
    A layer gets lora_a and lora_b (scaled), with DoRA dora_scale [L, *out], and keep_prob [L], the
    probability that an input is kept, where `dropout` is on.
    """
    if not frozen:
        return trained
    frozen = with_lengths(lora, frozen, trained)
    adapters = _scaled_adapters(lora, frozen["blocks"], trained.get("blocks", {}), dropout)
    if isinstance(frozen["blocks"], tuple):
        count = len(frozen["blocks"])
        by_layer = unstack(adapters) if adapters else ({},) * count
        blocks: Any = tuple(map(merge_trees, frozen["blocks"], by_layer))
    else:
        blocks = merge_trees(frozen["blocks"], adapters)
    frozen_rest = {name: part for name, part in frozen.items() if name != "blocks"}
    trained_rest = {name: part for name, part in trained.items() if name != "blocks"}
    return {**merge_trees(frozen_rest, trained_rest), "blocks": blocks}


def with_lengths(lora: LoraConfig, frozen: Params, trained: Params) -> Params:
    """`frozen` with lora_length [L, *out] where an adapter is DoRA's: the lengths of the updated
    kernel's columns, a constant for the gradient (Liu et al. 2024, section 4.3).

    Unchanged where it has them. Kernels must be complete: the lengths are sums over all inputs.
    """
    kernels, adapters = tree.flatten(frozen), tree.flatten(trained)
    lengths = {}
    for path in adapters:
        layer, _, name = path.rpartition("/")
        if name == "lora_m" and f"{layer}/lora_length" not in kernels:
            adapter = {part: adapters[f"{layer}/{part}"] for part in ("lora_a", "lora_b")}
            kernel = kernels[f"{layer}/kernel"].astype(jnp.float32) + update(lora, adapter)
            length = _input_norm(kernel, quantize.input_axes(layer))
            lengths[f"{layer}/lora_length"] = jax.lax.stop_gradient(length)
    return merge_trees(frozen, tree.nested(lengths)) if lengths else frozen


def _scaled_adapters(lora: LoraConfig, frozen: Any, trained: Params, dropout: bool) -> Params:
    """`trained` (below blocks/) in the form that the model's layers look for."""
    result: Params = {}
    for name, part in trained.items():
        if not isinstance(part, dict):
            result[name] = part
            continue
        if "lora_a" not in part:  # further down
            inner = frozen[name] if isinstance(frozen, dict) else {}
            result[name] = _scaled_adapters(lora, inner, part, dropout)
            continue
        adapter = {"lora_a": part["lora_a"], "lora_b": part["lora_b"] * lora.scale}
        if "lora_m" in part:
            adapter["dora_scale"] = part["lora_m"] / frozen[name]["lora_length"]
        if dropout and lora.dropout:
            adapter["keep_prob"] = jnp.full((len(part["lora_a"]),), 1 - lora.dropout)
        result[name] = adapter
    return result


def merge_trees(below: Any, above: Any) -> Any:
    """Nested dicts joined; where both have a leaf, `above` wins."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    result = dict(below)
    for name, part in above.items():
        result[name] = merge_trees(below[name], part) if name in below else part
    return result


def merge(lora: LoraConfig, base: Params, trained: Params) -> Params:
    """The base with the updates added into its kernels and whatever else was trained.

    Blocks are stacked. Prompts stay a parameter of their own: no kernel can hold them.
    """
    kernels, adapters = tree.flatten(base), tree.flatten(trained)
    result = dict(kernels)
    for path, leaf in adapters.items():
        layer, _, name = path.rpartition("/")
        if name == "lora_a":
            adapter = {"lora_a": leaf, "lora_b": adapters[f"{layer}/lora_b"]}
            old = kernels[f"{layer}/kernel"]
            kernel = old.astype(jnp.float32) + update(lora, adapter)
            magnitude = adapters.get(f"{layer}/lora_m")
            if magnitude is not None:
                inputs = quantize.input_axes(layer)
                gain = magnitude / _input_norm(kernel, inputs)
                kernel = kernel * gain.reshape(len(gain), *[1] * inputs, *gain.shape[1:])
            result[f"{layer}/kernel"] = kernel.astype(old.dtype)
        elif not name.startswith("lora_"):
            result[path] = leaf
    return tree.nested(result)
