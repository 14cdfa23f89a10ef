"""The layers that blocks are made of: norms and products, as Linen modules.

What computes an op is looked up in `ops.implementations` by `config.implementation`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
from jax.sharding import PartitionSpec as P

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.model.dropout import ROWS, keep_mask
from gptjax.ops import collectives
from gptjax.ops.implementations import IMPLEMENTATIONS, Ops


class Module(nn.Module):
    """A Linen module with the model's config and the ops that it asks for."""

    config: ModelConfig

    @property
    def ops(self) -> Ops:
        return IMPLEMENTATIONS[self.config.implementation]


class Norm(Module):
    """LayerNorm or RMSNorm over the last axis, in float32."""

    per_head: bool = False  # of queries and keys: always RMSNorm

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, ops = self.config, self.ops
        center = c.norm == "layernorm" and not self.per_head
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if c.norm_plus_one:
            scale = 1 + scale
        bias = None
        if center and c.bias in ("all", "mlp"):
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        norm = ops.head_norm if self.per_head else ops.norm
        return norm(x, scale, bias, eps=c.norm_eps, center=center)


class Linear(Module):
    """Contracts the last `inputs` axes of x with a kernel [*inputs, *features].

    Where the parameters hold `rows` (see `model.quantize`) instead of a kernel, those are used; an
    adapter next to them (see `model.lora`) adds its part, or one of each row's own. With
    `partial`, the inputs are split over the devices along `tensor`, and the result is this
    device's part of a sum over them.
    """

    features: tuple[int, ...] = ()
    bias: bool = False
    inputs: int = 1
    partial: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[-self.inputs :], *self.features)
        rows, columns = math.prod(shape[: self.inputs]), math.prod(self.features)
        x_ND = x.reshape(-1, rows)
        if self.has_variable("params", "rows"):
            y = self.ops.quantized_matmul(x_ND, self.variables["params"]).astype(x.dtype)
        else:
            kernel = self.param("kernel", nn.initializers.zeros, shape)
            y = self.ops.matmul(x_ND, kernel.reshape(rows, columns))
        if self.has_variable("params", "lora_a"):
            y = self._add_adapter(x, y, self.variables["params"])
        if self.has_variable("params", "lora_rows_a"):
            y = self._add_row_adapters(x, y, self.variables["params"])
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            bias = collectives.once(bias, "tensor") if self.partial else bias
            y = self.ops.bias_add(y, bias.reshape(columns))
        return y.reshape(*x.shape[: -self.inputs], *self.features)

    def _add_adapter(self, x: Array, y: Array, params: Any) -> Array:
        """y [N, F] + (x A) B, rescaled where the adapter is DoRA's."""
        a, b = params["lora_a"].astype(x.dtype), params["lora_b"].astype(x.dtype)
        if "keep_prob" in params and self.has_rng("dropout"):
            keep_prob, key = params["keep_prob"], self.make_rng("dropout")
            of_inputs = ["tensor" if self.partial else None, *[None] * (self.inputs - 1)]
            keep = keep_mask(key, keep_prob, x.shape, P(ROWS, "context", *of_inputs))
            x = x * keep / keep_prob.astype(x.dtype)
        a_DR, b_RF = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
        y = y + self.ops.low_rank(x.reshape(-1, len(a_DR)), a_DR, b_RF)
        if "dora_scale" in params:
            y = y * params["dora_scale"].astype(y.dtype).reshape(-1)
        return y

    def _add_row_adapters(self, x: Array, y: Array, params: Any) -> Array:
        """y [B * T, F] + (x A) B with an A [B, r, D] and a B [B, F, r] for each row of x."""
        a, b = params["lora_rows_a"].astype(x.dtype), params["lora_rows_b"].astype(x.dtype)
        x_BTD = x.reshape(len(a), -1, a.shape[-1])
        return y + self.ops.low_rank_rows(x_BTD, a, b).reshape(y.shape)
