"""The compiled programs that a process keeps ready, as many as the operating system allows.

XLA:CPU maps each kernel into memory by itself: about 260 maps for a program that loops over its
layers, 1,400 for one of thirty that does not. Linux allows a process 65,530 (`vm.max_map_count`),
and XLA crashes past them. So those used longest ago are let go.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

_SHARE = 0.5  # of the maps that are allowed: the rest is for what is compiled next, and for others


class Programs:
    """Executables by key. Any thread may use it.

    forget: called first where maps run short, to let go of programs that are kept elsewhere.
    """

    def __init__(self, forget: Callable[[], None] = lambda: None):
        self._forget = forget
        self._programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """None where it is not here, or no longer."""
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
            return self._programs.get(key)

    def add(self, key: Any, program: Any) -> None:
        with self._lock:
            self._programs[key] = program
            self._programs.move_to_end(key)
        self.make_room()

    def make_room(self) -> None:
        """Lets go of programs while maps are short; never of the one used last."""
        if not is_crowded():
            return
        self._forget()
        gc.collect()
        while is_crowded():
            with self._lock:
                if len(self._programs) < 2:
                    return
                self._programs.popitem(last=False)


def is_crowded() -> bool:
    """Whether maps of memory are getting short."""
    used, limit = memory_maps()
    return used > _SHARE * limit


def memory_maps() -> tuple[int, int]:
    """How many this process has, and may have; (0, 0) where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            limit = int(file.read())
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file), limit
    return 0, 0
