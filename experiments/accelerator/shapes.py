"""What is trained, decoded and checked, at its real size and at the size of the rehearsal."""

from __future__ import annotations

import dataclasses
from typing import Any

from configs import sizes


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training step: settings of `config.model`, sequences a step, and in how many pieces."""

    name: str
    model: dict[str, Any]
    rows: int
    micro_batches: int = 1

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Of the config."""
        train = dict(batch_size=self.rows, grad_accum_steps=self.micro_batches)
        return {"model": self.model, "train": train}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Generation: prompts of so many random tokens, and how many new ones."""

    name: str
    model: dict[str, Any]
    rows: tuple[int, ...]
    prompt: int
    new: int


_BFLOAT16 = dict(dtype="bfloat16", attention="auto", remat="none", scan_layers=False)
_TOY = dict(layers=2, width=64, heads=4, context=64, vocab_size=500)
_TOY_LLAMA = sizes.LLAMA | _TOY | dict(kv_heads=2, mlp_dim=128, tie_embeddings=True)

# 16 x 1,024 tokens a step as in nanoGPT's recipes. The 1 B goes through 8 x 2,048 tokens two rows
# at a time, so that both contenders, with their optimizer's state, fit on 80 GB side by side
# without computing activations twice.
TRAINED = {
    "gpt2": Trained("GPT-2 124M", sizes.GPT2 | _BFLOAT16, rows=16),
    "llama": Trained(
        "Llama 1 B",
        sizes.LLAMA_1B | _BFLOAT16 | dict(context=2048, vocab_size=32000, scan_layers=True),
        rows=8,
        micro_batches=4,
    ),
}
TOY_TRAINED = {
    "gpt2": Trained("toy GPT-2", _TOY | _BFLOAT16, rows=4),
    "llama": Trained(
        "toy Llama", _TOY_LLAMA | _BFLOAT16 | dict(scan_layers=True), rows=4, micro_batches=2
    ),
}

DECODED = (
    Decoded("GPT-2 124M", sizes.GPT2, rows=(1, 8, 64), prompt=64, new=128),
    Decoded("SmolLM2 135M", sizes.SMOLLM2_135M, rows=(1, 8, 64), prompt=64, new=128),
)
TOY_DECODED = (
    Decoded("toy GPT-2", _TOY, rows=(1, 2), prompt=4, new=8),
    Decoded("toy Llama", _TOY_LLAMA, rows=(1,), prompt=4, new=8),
)

# Rows, positions, key/value heads, query heads on each, width of a head.
ATTENTION = dict(b=2, t=1024, k=4, g=2, c=64)
TOY_ATTENTION = dict(b=2, t=48, k=2, g=2, c=8)

# Bytes read, and n = d = f of the product, that tell what the device can do at best.
CEILINGS = dict(read=8 << 30, matrix=8192)
TOY_CEILINGS = dict(read=16 << 20, matrix=256)
