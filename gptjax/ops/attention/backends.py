"""The table of attention backends: the setting `model.attention` names one of these rows.

A row gives the function of each platform; "" stands for every platform that is not named. Functions
have the form of `reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from gptjax.core.types import Array
from gptjax.ops.attention.blockwise import blockwise
from gptjax.ops.attention.reference import reference
from gptjax.ops.attention.xla import xla
from gptjax.ops.materialize import materialize

BACKENDS: dict[str, dict[str, Callable[..., Array]]] = {
    "xla": {"cpu": functools.partial(xla, barrier=materialize), "": xla},
    "blockwise": {"": blockwise},
    "reference": {"": reference},
}


def backends_for(platform: str) -> dict[str, Callable[..., Array]]:
    """{setting: function} on a platform such as "cpu"."""
    return {name: row.get(platform, row[""]) for name, row in BACKENDS.items()}
