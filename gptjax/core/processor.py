"""What the processor of this machine can do."""

from __future__ import annotations

import contextlib
import functools


@functools.cache
def instruction_sets() -> frozenset[str]:
    """Names as Linux gives them, such as "avx512f"; empty where nothing tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
