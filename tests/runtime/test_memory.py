"""Memory that a training step on a CPU freed is used again by the next one."""

import subprocess
import sys

import pytest

# What the products of a step do in XLA's threads: blocks that one heap of a thread cannot hold
# together are taken, written and freed. Prints the page faults of the first and of the third time.
PROGRAM = """
import ctypes, resource, sys, threading
from gptjax.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = []
def use_blocks():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        blocks = [libc.malloc(ctypes.c_size_t(20 << 20)) for _ in range(4)]
        for block in blocks:
            ctypes.memset(block, 1, 20 << 20)
        for block in blocks:
            libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
thread = threading.Thread(target=use_blocks)
thread.start()
thread.join()
print(faults[0], faults[2])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_threads_keep_the_heaps_that_they_freed():
    def faults(mode: str) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, mode]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(count) for count in result.stdout.split()]

    first, third = faults("keep")
    assert first > 1000 > 10 * third
    _, third = faults("usual")
    assert third > 1000
