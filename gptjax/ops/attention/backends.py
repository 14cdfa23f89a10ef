"""The table of attention backends: the setting `model.attention` names one of these rows.

A row gives the function of each platform; "" stands for every platform that is not named. Functions
have the form of `reference`; one that a platform has not refuses by name. "auto" takes, for each
call, the row that `choose` names; all rows compute the same up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from gptjax.core.types import Array
from gptjax.ops.attention.blockwise import blockwise
from gptjax.ops.attention.cudnn import WIDEST_HEAD, cudnn, fault, mask_shape
from gptjax.ops.attention.mask import Mask
from gptjax.ops.attention.reference import reference
from gptjax.ops.attention.splash import splash
from gptjax.ops.attention.xla import xla
from gptjax.ops.materialize import materialize

# On a CPU, rows up to this length keep their weights (`xla`): faster there, see experiments/LOG.md.
LONGEST_XLA_ROW = 2048

Backend = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a call of attention asks for, known from shapes: of one device, and one micro-batch."""

    dtype: str
    rows: int
    queries: int
    keys: int
    head_width: int
    packed: bool = False
    dropout: bool = False
    softcap: float = 0.0


def choose(platform: str, call: Call) -> str:
    """The row that "auto" takes on a platform: "cpu", "gpu", "tpu", or "" where none is known."""
    if call.dropout:  # of attention weights: those that keep them have it
        return "xla"
    if platform == "tpu":
        return "splash"
    if platform != "gpu":
        return "xla" if call.keys <= LONGEST_XLA_ROW else "blockwise"
    refused = fault(
        dtype=call.dtype,
        head_width=call.head_width,
        mask=mask_shape(call.rows, call.queries, call.keys, packed=call.packed),
        softcap=call.softcap,
    )
    return "blockwise" if refused or call.head_width > WIDEST_HEAD else "cudnn"


def _automatic(platform: str) -> Backend:
    def auto(
        q_BTKGC: Array,
        k_BSKC: Array,
        v_BSKC: Array,
        mask: Mask,
        *,
        block: int = 256,
        dropout_BKGTS: Array | None = None,
        softcap: float = 0.0,
    ) -> Array:
        call = Call(
            dtype=q_BTKGC.dtype.name,
            rows=q_BTKGC.shape[0],
            queries=q_BTKGC.shape[1],
            keys=k_BSKC.shape[1],
            head_width=q_BTKGC.shape[-1],
            packed=mask.q_segments is not None,
            dropout=dropout_BKGTS is not None,
            softcap=softcap,
        )
        attend = backends_for(platform)[choose(platform, call)]
        return attend(
            q_BTKGC,
            k_BSKC,
            v_BSKC,
            mask,
            block=block,
            dropout_BKGTS=dropout_BKGTS,
            softcap=softcap,
        )

    return auto


def _refusing(message: str) -> Backend:
    def refuse(*args: Array, **kwargs: Array) -> Array:
        raise ValueError(f"{message}: use model.attention = 'auto'")

    return refuse


BACKENDS: dict[str, dict[str, Backend]] = {
    "auto": {platform: _automatic(platform) for platform in ("cpu", "gpu", "tpu", "")},
    "xla": {"cpu": functools.partial(xla, barrier=materialize), "": xla},
    "blockwise": {"": blockwise},
    "splash": {
        "tpu": splash,
        "cpu": functools.partial(splash, interpret=True),  # slow, to try it
        "": _refusing("splash attention has kernels for TPUs alone"),
    },
    "cudnn": {
        "gpu": cudnn,
        "": _refusing("cuDNN's attention has kernels for NVIDIA GPUs alone"),
    },
    "reference": {"": reference},
}


def backends_for(platform: str) -> dict[str, Backend]:
    """{setting: function} on a platform such as "cpu"."""
    return {name: row.get(platform, row[""]) for name, row in BACKENDS.items()}
