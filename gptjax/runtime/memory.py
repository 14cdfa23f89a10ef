"""TODO docstring."""

from __future__ import annotations

import ctypes
import sys

import jax


def keep_freed_memory() -> None:
    """XLA's CPU buffers of one step become those of the next: glibc keeps freed blocks instead of handing each back to the kernel, which would
    fault fresh pages in every time (measured in experiments/LOG.md). Call it before the first array; elsewhere a no-op."""
    if _mallopt({-4: 0, -1: 2**31 - 1}):  # <malloc.h>: M_MMAP_MAX, M_TRIM_THRESHOLD
        # steps run in the thread that asks for them: the heap of any other ends at 64 MB, and a larger block would be mapped anew all the same
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def return_freed_memory() -> None:
    """The contrary: blocks of a MiB and more go back as soon as they are freed, so that memory holds what is in use."""
    _mallopt(
        {-3: 1 << 20, -8: 1}
    )  # M_MMAP_THRESHOLD, which would grow with the blocks freed; M_ARENA_MAX: one heap for all threads


def _mallopt(options: dict[int, int]) -> bool:
    """Whether this C library has such options; not all do."""
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    )
    if mallopt is None:
        return False
    for name, value in options.items():
        mallopt(name, value)
    return True
