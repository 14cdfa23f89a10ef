"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable

from gptjax.core.types import Array
from gptjax.ops.attention.blockwise import blockwise
from gptjax.ops.attention.reference import reference
from gptjax.ops.attention.xla import xla

BACKENDS: dict[str, Callable[..., Array]] = {
    "reference": reference,
    "xla": xla,
    "blockwise": blockwise,
}
