"""Which keys a query may see: causality, packed documents, a sliding window, slots of a cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.core.types import Array

# finite: exp underflows to an exact 0, and no NaN arises from a block without a visible key
MASKED = -1e30

# The name (`checkpoint_name`) of what the backward pass of a backend needs beside q, k and v: the
# outputs, and the softmax's sums where it has those. A rematerialisation policy that keeps them
# spares the flash kernels a second forward run.
SAVED_NAME = "attention"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_index", "q_segments", "k_segments", "use_window"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query sees key s when s <= its own index, in its own segment, and less than `window` back
    (0: any distance).

    q_index [B or 1, T]: the slot of each query among the keys; slots of a cache past it are not
    filled yet.
    q_segments [B, T], k_segments [B, S]: document numbers, both or neither.
    use_window: bool scalar, of a layer where others have no window; None: the window holds.
    """

    q_index: Array
    q_segments: Array | None = None
    k_segments: Array | None = None
    window: int = 0
    use_window: Array | None = None

    def allowed(self, k_start: Any, k_size: int) -> Array:
        """bool [B or 1, T, k_size] for the keys [k_start, k_start + k_size)."""
        slots = k_start + jnp.arange(k_size, dtype=jnp.int32)[None, None, :]
        q = self.q_index[:, :, None]
        visible = slots <= q
        if self.window:
            in_window = slots > q - self.window
            if self.use_window is not None:
                in_window |= ~self.use_window
            visible &= in_window
        if self.q_segments is not None and self.k_segments is not None:
            keys = jax.lax.dynamic_slice_in_dim(self.k_segments, k_start, k_size, axis=1)
            visible &= self.q_segments[:, :, None] == keys[:, None, :]
        return visible
