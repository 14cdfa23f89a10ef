"""Rotary position embeddings (RoPE, Su et al. 2021) and the ways to stretch them over a context.

`rope_tables` gives cos and sin of the angles of some positions, `rotate` turns queries or keys by
them. To add a scaling, add a function of the frequencies to `_SCALINGS` and its name to the choices
of `model.rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array


def rope_tables(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """cos, sin [B, T, R/2] in float32, for the R = `rotary_width` leading dims of a head.

    positions: integers [B, T].
    """
    half = config.rotary_width // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequencies = _SCALINGS[config.rope_scaling](config, frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    factor = _attention_factor(config)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _unscaled(config: ModelConfig, frequencies: Array) -> Array:
    return frequencies


def _linear(config: ModelConfig, frequencies: Array) -> Array:
    """Positions are squeezed into the original context (Chen et al. 2023)."""
    return frequencies / config.rope_factor


def _llama3(config: ModelConfig, frequencies: Array) -> Array:
    """Low frequencies are divided, high ones stay, others are mixed (the release of Llama 3.1)."""
    c = config
    turns = c.rope_original_context * frequencies / (2 * math.pi)
    span = c.rope_high_freq_factor - c.rope_low_freq_factor
    share_kept = jnp.clip((turns - c.rope_low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (share_kept + (1 - share_kept) / c.rope_factor)


def _yarn(config: ModelConfig, frequencies: Array) -> Array:
    """As `_llama3`, mixed by the index of the frequency (YaRN, Peng et al. 2023, section 3.2)."""
    c, half = config, len(frequencies)

    def index_with(turns: float) -> float:
        """Index of the frequency that makes so many turns over the original context."""
        ratio = c.rope_original_context / (turns * 2 * math.pi)
        return half * math.log(ratio) / math.log(c.rope_theta)

    low = max(math.floor(index_with(c.rope_beta_fast)), 0)
    high = min(math.ceil(index_with(c.rope_beta_slow)), 2 * half - 1)
    share_kept = 1 - jnp.clip((jnp.arange(half) - low) / (high - low or 1e-3), 0.0, 1.0)
    return frequencies * (share_kept + (1 - share_kept) / c.rope_factor)


def _attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by, to keep attention sharp (YaRN, section 3.4)."""
    if config.rope_scaling != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(config.rope_factor) + 1.0


_SCALINGS: dict[str, Callable[[ModelConfig, Array], Array]] = {
    "none": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [..., C] with the pairs (x[i], x[i + R/2]) of its R leading dims turned, in float32.

    cos, sin [..., R/2]; the other dims stay as they are. This is the order of GPT-NeoX and Llama.
    """
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned_a = (a * cos - b * sin).astype(x.dtype)
    turned_b = (b * cos + a * sin).astype(x.dtype)
    return jnp.concatenate([turned_a, turned_b, x[..., 2 * half :]], axis=-1)
