"""Rotary position embeddings (Su et al. 2021) and the ways to stretch them over longer contexts.

To add a scaling, write a function like `_linear`, add a row to `SCALINGS`, and its settings to
`config/model_config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from gptjax.config.schema import ModelConfig


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float32[Array, "B T R2"], Float32[Array, "B T R2"]]:
    """cos and sin [B, T, R/2] for the R = `rotary_width` leading dims of a head."""
    half = config.rotary_width // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequencies, factor = SCALINGS[config.rope_scaling](config, frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "*S C"], cos: Float32[Array, "*R"], sin: Float32[Array, "*R"]
) -> Float[Array, "*S C"]:
    """x with the pairs (x[i], x[i + R/2]) of its R = 2 * cos.shape[-1] leading dims rotated, in
    float32; the other dims pass."""
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    first, second = a * cos - b * sin, b * cos + a * sin
    rest = x[..., 2 * half :]
    return jnp.concatenate([first.astype(x.dtype), second.astype(x.dtype), rest], axis=-1)


# What a scaling makes of the frequencies [R/2], and what cos and sin are multiplied by.
Scaled = tuple[Array, float]


def _none(c: ModelConfig, frequencies: Array) -> Scaled:
    return frequencies, 1.0


def _linear(c: ModelConfig, frequencies: Array) -> Scaled:
    """All positions divided by the factor (Chen et al. 2023)."""
    return frequencies / c.rope_factor, 1.0


def _llama3(c: ModelConfig, frequencies: Array) -> Scaled:
    """Only slow frequencies are divided, with a smooth step in between (the Llama 3.1 release)."""
    turns = c.rope_original_context * frequencies / (2 * math.pi)
    low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
    unscaled = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (unscaled + (1 - unscaled) / c.rope_factor), 1.0


def _yarn(c: ModelConfig, frequencies: Array) -> Scaled:
    """The same by index, and a temperature of attention (Peng et al. 2023, section 3)."""
    half = len(frequencies)

    def index(turns: float) -> float:
        """Of the pair that makes so many turns over the original context."""
        wavelengths = c.rope_original_context / (turns * 2 * math.pi)
        return half * math.log(wavelengths) / math.log(c.rope_theta)

    low = max(math.floor(index(c.rope_beta_fast)), 0)
    high = min(math.ceil(index(c.rope_beta_slow)), 2 * half - 1)
    unscaled = 1 - jnp.clip((jnp.arange(half) - low) / (high - low or 1e-3), 0.0, 1.0)
    factor = c.rope_attention_factor or (0.1 * math.log(c.rope_factor) + 1.0)
    return frequencies * (unscaled + (1 - unscaled) / c.rope_factor), factor


SCALINGS: dict[str, Callable[[ModelConfig, Array], Scaled]] = {
    "none": _none,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
