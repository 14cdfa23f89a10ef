"""How the C library's allocator treats freed memory. The functions do nothing where the C library
is not glibc.
"""

from __future__ import annotations

import ctypes
import sys

import jax

# Options of mallopt(3), from glibc's <malloc.h>.
_MAX_FAST = 1
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
_HEAP_BYTES = 1 << 26  # the most that a heap of any thread but the main one can hold


def keep_freed_memory() -> None:
    """For training: the buffers of one step on a CPU are used again by the next.

    glibc keeps freed blocks, instead of giving each back to the kernel, which would have to hand
    out new pages at every step (measured in experiments/LOG.md). Call it before the first array.
    """
    # the pad: a thread's heap goes back to the kernel once it is empty, unless it is smaller than
    # that; a product's own buffers would come from new pages every time
    if _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: _HEAP_BYTES}):
        # A step then runs in the thread that asks for it. The heap of any other thread ends at
        # 64 MB, and larger blocks would be mapped again at every step all the same.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def return_freed_memory() -> None:
    """The opposite: blocks of 1 MiB and more go back to the kernel as soon as they are freed."""
    # set, because the threshold would grow with the blocks freed; one heap for all threads
    _mallopt({_MMAP_THRESHOLD: 1 << 20, _ARENA_MAX: 1})


def join_freed_blocks() -> None:
    """For texts that follow a grammar: small freed blocks become part of free ones beside them.

    A call of a compiled decoding program takes and frees thousands of small blocks. glibc keeps
    them apart until somebody asks for a large one, and that is the grammar's library, once or more
    for each token (measured in experiments/LOG.md).
    """
    _mallopt({_MAX_FAST: 0})


def _mallopt(options: dict[int, int]) -> bool:
    """Whether this C library has mallopt; not all do."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    for name, value in options.items():
        mallopt(name, value)
    return True
