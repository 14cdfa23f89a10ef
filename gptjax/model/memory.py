"""What of a model a device holds at once: the parameters of one layer, and what is saved for the
backward pass.

To add a policy of rematerialization, add a row to `POLICIES` and a choice to `model.remat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from gptjax.config.schema import ModelConfig
from gptjax.core import tree
from gptjax.core.types import Array, Params
from gptjax.ops import collectives
from gptjax.ops.attention.mask import SAVED_NAME
from gptjax.runtime.sharding import RULES

_policies = jax.checkpoint_policies


def _all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """Saves everything except gathered weights, and copies of them in another shape or dtype."""
    gathers_weights = primitive.name == "all_gather" and "fsdp" in params["axis_name"]
    return not gathers_weights and primitive.name not in ("reshape", "convert_element_type")


# What the backward pass finds saved; the rest it computes again. Names are given where the values
# arise (`checkpoint_name`): what attention needs, and the residual stream before each block.
POLICIES: dict[str, Any] = {
    "none": _all_but_weights,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attention": _policies.save_only_these_names(SAVED_NAME),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialized(
    config: ModelConfig, block: Callable[..., Any], *, scanned: bool
) -> Callable[..., Any]:
    """A block of layers that saves what `model.remat` says; "auto", outside of a training's plan,
    is "none".

    Weights that were gathered are never saved: the backward pass gathers them again.
    """
    remat = "none" if config.remat == "auto" else config.remat
    if remat == "none" and collectives.size("fsdp") == 1:
        return block

    def named(x_BTD: Array, layer: Any) -> Any:
        return block(checkpoint_name(x_BTD, "residual"), layer)

    # in a loop XLA cannot merge the second computation with the first: no barrier is needed
    return jax.checkpoint(named, policy=POLICIES[remat], prevent_cse=not scanned)


def whole_layer(block: Params) -> Params:
    """The parameters of one layer as its products use them: kernels that are split over `fsdp`
    gathered; rows of gate and up joined, where `quantize.gates_apart` has set them apart."""

    of_all_layers = "layer" in block["mlp"].get("gate_up", {})  # rows of one device: never apart
    apart = {} if of_all_layers else {"rows": 3, "row_scale": 2}

    def prepared(path: str, leaf: Array) -> Array:
        module, _, name = path.rpartition("/")
        if module == "mlp/gate_up" and leaf.ndim == apart.get(name):
            return leaf.reshape(-1, *leaf.shape[2:])
        if name != "kernel" or collectives.size("fsdp") == 1:
            return leaf
        spec = tree.first_match(RULES, f"blocks/{module}/kernel")
        for dim, axis in enumerate(spec[1:]):  # the layer is the first axis of the table's shapes
            if axis == "fsdp":
                leaf = collectives.gather(leaf, "fsdp", dim)
        return leaf

    return tree.map_with_path(prepared, block)
