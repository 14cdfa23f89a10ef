"""The table of implementations: for each platform, which function computes each op.

`resolve` names the row for the devices of a mesh; `ModelConfig.implementation` carries the name
into the model, so that no op ever asks where it runs. Every row computes what the reference
defines (`tests/ops/test_implementations.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from gptjax.core.types import Array
from gptjax.ops import activation as activations
from gptjax.ops import cross_entropy as losses
from gptjax.ops import norm as norms
from gptjax.ops import products, quantized
from gptjax.ops.attention import cache
from gptjax.ops.attention.backends import backends_for
from gptjax.ops.attention.reference import reference as reference_attention
from gptjax.ops.materialize import materialize
from gptjax.ops.unstack import unstack, unstack_together

Op = Callable[..., Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Ops:
    """One function for each op; its reference says what it takes and gives."""

    unstack: Callable[..., tuple] = unstack  # of the parameters of stacked blocks
    norm: Op = norms.reference
    head_norm: Op = norms.reference  # of the queries and keys of each head
    activation: dict[str, Op] = dataclasses.field(default_factory=lambda: activations.REFERENCES)
    matmul: Op = products.matmul
    bias_add: Op = products.bias_add
    low_rank: Op = products.low_rank
    low_rank_rows: Op = products.low_rank_rows
    residual_add: Op = products.residual_add
    split_qkv: Callable[..., tuple[Array, Array, Array]] = products.split_qkv
    attention: dict[str, Op] = dataclasses.field(default_factory=lambda: backends_for(""))
    cached_attention: Op = cache.cached_attention
    write_cache: Callable[..., dict[str, Array]] = cache.write_cache
    quantized_matmul: Op = quantized.matmul
    quantized_lookup: Op = quantized.lookup
    cross_entropy: Op = losses.reference
    logprobs: Op = losses.reference_logprobs
    # For generation, not ops: whether its programs, on one device, are loops over the layers; how
    # many tokens prefill feeds at once, enough to be limited by arithmetic rather than by reading
    # weights; the most rows of a program of decoding in slots; up to how many tokens a pass takes
    # about as long as one of a single token; the dtype of activations next to bfloat16 and int8
    # weights.
    loops_layers: bool = False
    prefill_chunk: int = 256
    decode_rows: int = 128
    tokens_of_a_pass: int = 256
    activation_dtype: str = "bfloat16"


# Plain JAX, whatever backend of attention is asked for: differentiable forward and backward.
REFERENCE = Ops(attention=dict.fromkeys(backends_for(""), reference_attention))

# XLA fuses well there, so that only what saves memory differs from the reference.
ACCELERATOR = Ops(
    unstack=unstack_together,
    norm=norms.saving_unit,
    head_norm=norms.saving_unit,
    activation=activations.ACCELERATOR,
    quantized_matmul=quantized.matmul_accelerator,
    cross_entropy=losses.chunked,
    logprobs=losses.chunked_logprobs,
)

# Values with several readers are written to memory: XLA:CPU would compute them once per reader.
CPU = Ops(
    unstack=unstack_together,
    norm=norms.saving_unit_cpu,
    head_norm=functools.partial(norms.saving_unit, barrier=materialize),
    activation=activations.CPU,
    matmul=products.by_rows_matmul,
    bias_add=products.by_rows_bias_add,
    low_rank=products.low_rank_materialized,
    low_rank_rows=products.low_rank_rows_cpu,
    residual_add=products.residual_add_materialized,
    split_qkv=products.split_qkv_materialized,
    attention=backends_for("cpu"),
    cached_attention=cache.cached_attention_cpu,
    write_cache=functools.partial(cache.write_cache, barrier=materialize),
    quantized_matmul=quantized.matmul_cpu,
    quantized_lookup=functools.partial(quantized.lookup, barrier=materialize),
    cross_entropy=functools.partial(
        losses.chunked, barrier=materialize, transposed=products.transposed_copy, cpu=True
    ),
    logprobs=functools.partial(losses.chunked_logprobs, barrier=materialize),
    # Unrolled, a program of 30 layers takes five times as long to compile and its call 2 ms more:
    # XLA:CPU makes a buffer for each value in each of its reductions.
    loops_layers=True,
    prefill_chunk=32,
    decode_rows=2 * products.FEW,  # a program of 8 has a tenth less, one of 32 a later first token
    tokens_of_a_pass=products.FEW,
    activation_dtype="float32",  # its products convert each weight anyway
)

# For decoding rows whose results must not depend on how many there are.
CPU_IN_ORDER = dataclasses.replace(
    CPU,
    norm=norms.in_order,
    head_norm=norms.in_order,
    quantized_matmul=quantized.matmul_in_order,
)

IMPLEMENTATIONS: dict[str, Ops] = {
    "reference": REFERENCE,
    "auto": Ops(),  # not resolved yet: the reference, with the backend of attention asked for
    "cpu": CPU,
    "cpu in order": CPU_IN_ORDER,
    "gpu": dataclasses.replace(ACCELERATOR, attention=backends_for("gpu")),
    "tpu": dataclasses.replace(ACCELERATOR, attention=backends_for("tpu")),
}


def resolve(setting: str, *, platform: str) -> str:
    """The row for devices of a platform ("cpu", "gpu", "tpu").

    setting: `model.implementation`; whatever is not "auto" stays as it is. A platform without a row
    of its own gets that of GPUs, which has nothing that only a GPU can do.
    """
    if setting != "auto":
        return setting
    return platform if platform in IMPLEMENTATIONS else "gpu"
