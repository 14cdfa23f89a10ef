"""Adapters: small parameters beside frozen ones, as pure functions on the parameter dict.

`init` makes them, `attach` puts them where the model's layers find them, `merge` adds them into the kernels. A target's adapter lies beside its
kernel: lora_a [L, *in, r], lora_b [L, r, *out], with DoRA lora_m [L, *out]; prompt tuning adds embed/prompt [P, D]. The update of a kernel W is
(alpha / r) A B (Hu et al. 2021); DoRA turns that into m (W + update) / |W + update|, the norm taken over inputs (Liu et al. 2024).
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
from gptjax.model import quantize, transformer


def targets(
    lora: LoraConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """{path of a layer below blocks/: (input axes, output axes)}. shapes: as `transfer.our_shapes`. Raises UserError for a pattern without a match."""
    kernels = {
        path.removesuffix("/kernel"): shape
        for path, shape in shapes.items()
        if path.startswith("blocks/") and path.endswith("/kernel")
    }
    if missing := [
        p
        for p in lora.targets
        if p not in LoraConfig().targets and not any(tree.matches([p], path) for path in kernels)
    ]:
        raise UserError(
            f"lora.targets: {missing[0]!r} matches no layer; there are {', '.join(kernels)}"
        )
    return {
        path: (s[: quantize.input_axes(path)], s[quantize.input_axes(path) :])
        for path, s in kernels.items()
        if tree.matches(lora.targets, path)
    }


def init(config: ModelConfig, lora: LoraConfig, key: Array, base: Params) -> Params:
    """New adapters: A uniform within 1 / sqrt(inputs), B zero, so that the model starts as its base. Prompts start as embeddings of random tokens.
    base: its params (only DoRA's magnitudes and prompts read them)."""
    flat: dict[str, Array] = {}
    if lora.rank:
        for i, (path, (ins, outs)) in enumerate(
            targets(lora, model_init.kernel_shapes(config)).items()
        ):
            bound = 1 / math.sqrt(math.prod(ins))
            flat[f"{path}/lora_a"] = jax.random.uniform(
                jax.random.fold_in(key, i),
                (config.layers, *ins, lora.rank),
                minval=-bound,
                maxval=bound,
            )
            flat[f"{path}/lora_b"] = jnp.zeros((config.layers, lora.rank, *outs))
            if lora.dora:
                flat[f"{path}/lora_m"] = _norm(
                    tree.flatten(base)[f"{path}/kernel"].astype(jnp.float32), len(ins)
                )
    if lora.prompt_tokens:
        ids = jax.random.randint(
            jax.random.fold_in(key, 1 << 20), (lora.prompt_tokens,), 0, config.vocab_size
        )
        flat["embed/prompt"] = transformer.embed(config, base, ids).astype(jnp.float32)
    return tree.nested(flat)


def _norm(kernel: Array, inputs: int) -> Array:
    """Length of each output's weights: [L, *in, *out] -> [L, *out]."""
    return jnp.sqrt(jnp.square(kernel).sum(tuple(range(1, 1 + inputs))))


def update(lora: LoraConfig, part: Params) -> Array:
    """(alpha / r) A B of one layer's adapter, in the kernel's shape."""
    a, b = part["lora_a"], part["lora_b"]
    flat = jnp.einsum(
        "Lir,Lro->Lio", a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), b.shape[1], -1)
    )
    return (lora.alpha / lora.rank) * flat.reshape(*a.shape[:-1], *b.shape[2:])


def apply_adapter(
    lora: LoraConfig, frozen: Params, trained: Params, *, dropout: bool = False
) -> Params:
    """The whole model's parameters: `trained` laid over `frozen` (blocks stacked, or apart as `quantize.inference_params` has them). A layer finds
    lora_a and lora_b (scaled), dora_scale where there is DoRA, and keep_prob where `dropout` is on."""
    if not frozen:
        return trained
    blocks = _scaled_adapters(lora, frozen["blocks"], trained.get("blocks", {}), dropout)
    rest = {name: part for name, part in trained.items() if name != "blocks"}
    if isinstance(frozen["blocks"], tuple):
        added = tree.unstack(blocks) if blocks else ({},) * len(frozen["blocks"])
        joined: Any = tuple(
            merge_trees(block, more) for block, more in zip(frozen["blocks"], added, strict=True)
        )
    else:
        joined = merge_trees(frozen["blocks"], blocks)
    return {
        **merge_trees({k: v for k, v in frozen.items() if k != "blocks"}, rest),
        "blocks": joined,
    }


def _scaled_adapters(lora: LoraConfig, frozen: Any, trained: Params, dropout: bool) -> Params:
    found: Params = {}
    for name, part in trained.items():
        if "lora_a" not in part:
            found[name] = (
                _scaled_adapters(
                    lora, frozen[name] if isinstance(frozen, dict) else {}, part, dropout
                )
                if isinstance(part, dict)
                else part
            )
            continue
        found[name] = {
            "lora_a": part["lora_a"],
            "lora_b": part["lora_b"] * (lora.alpha / lora.rank),
        }
        if "lora_m" in part:
            inputs = quantize.input_axes(name)
            length = jax.lax.stop_gradient(
                _norm(frozen[name]["kernel"].astype(jnp.float32) + update(lora, part), inputs)
            )
            found[name]["dora_scale"] = part["lora_m"] / length
        if dropout and lora.dropout:
            found[name]["keep_prob"] = jnp.full((len(part["lora_a"]),), 1 - lora.dropout)
    return found


def merge_trees(below: Any, above: Any) -> Any:
    """Nested dicts joined; `above` wins."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {
        **below,
        **{
            name: merge_trees(below[name], part) if name in below else part
            for name, part in above.items()
        },
    }


def merge(lora: LoraConfig, base: Params, trained: Params) -> Params:
    """The base with the updates added into its kernels, and whatever else was trained; prompts stay beside it. Blocks stacked."""
    flat, added = tree.flatten(base), tree.flatten(trained)
    result = dict(flat)
    for path in added:
        layer, _, leaf = path.rpartition("/")
        if leaf == "lora_a":
            part = {
                n: added[f"{layer}/{n}"]
                for n in ("lora_a", "lora_b", "lora_m")
                if f"{layer}/{n}" in added
            }
            kernel, inputs = f"{layer}/kernel", quantize.input_axes(layer)
            whole = flat[kernel].astype(jnp.float32) + update(lora, part)
            if "lora_m" in part:
                gain = part["lora_m"] / _norm(whole, inputs)
                whole = whole * gain.reshape(len(gain), *[1] * inputs, *gain.shape[1:])
            result[kernel] = whole.astype(flat[kernel].dtype)
        elif not leaf.startswith("lora_"):
            result[path] = added[path]
    return tree.nested(result)
