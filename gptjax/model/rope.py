"""TODO docstring."""

from __future__ import annotations

import math

import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array


def rope_tables(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """cos, sin [B, T, R/2] in float32 for the R = `rotary_width` leading dims (Su et al. 2021). Scaling of long contexts: linear (Chen et al.
    2023); llama3 (the Llama 3.1 release); yarn (Peng et al. 2023, section 3)."""
    c, half = config, config.rotary_width // 2
    inverse, factor = c.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0
    if c.rope_scaling == "linear":
        inverse = inverse / c.rope_factor
    elif c.rope_scaling == "llama3":
        turns = c.rope_original_context * inverse / (2 * math.pi)
        smooth = jnp.clip(
            (turns - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor),
            0.0,
            1.0,
        )
        inverse = inverse * (smooth + (1 - smooth) / c.rope_factor)
    elif c.rope_scaling == "yarn":
        # the index of the pair that makes this many turns over the original context
        index = lambda turns: (
            half
            * math.log(c.rope_original_context / (turns * 2 * math.pi))
            / math.log(c.rope_theta)
        )
        low, high = (
            max(math.floor(index(c.rope_beta_fast)), 0),
            min(math.ceil(index(c.rope_beta_slow)), 2 * half - 1),
        )
        kept = 1 - jnp.clip((jnp.arange(half) - low) / (high - low or 1e-3), 0.0, 1.0)
        inverse = inverse * (kept + (1 - kept) / c.rope_factor)
        factor = c.rope_attention_factor or (0.1 * math.log(c.rope_factor) + 1.0)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + R/2]) of the R = 2 * cos.shape[-1] leading dims, in float32; the others pass."""
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    return jnp.concatenate(
        [
            (a * cos - b * sin).astype(x.dtype),
            (b * cos + a * sin).astype(x.dtype),
            x[..., 2 * half :],
        ],
        axis=-1,
    )
