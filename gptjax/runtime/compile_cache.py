"""JAX's compile cache on disk, and a counter of compilations."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax

from gptjax.core import cli, files

# How JAX says that an entry of its cache is damaged, or cannot be written; it compiles then.
_JAX_WARNING = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


class Compiles:
    """Counts what `jax.monitoring` reports from now on.

    count, seconds: XLA compilations. hits, misses: programs found, or not, in the cache on disk.
    """

    def __init__(self) -> None:
        self.count, self.seconds, self.hits, self.misses = 0, 0.0, 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs

    def _on_event(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"


def enable_compile_cache() -> None:
    """Stores compiled programs on disk and reads them from there, also in later processes.

    In the folder of JAX_COMPILATION_CACHE_DIR if it is set, else in our cache folder; where that
    cannot be made, that is said and programs are compiled anew. Programs that compile faster than
    0.2 s are not stored.
    """
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        try:
            folder = files.cache_dir("xla")
        except OSError as error:
            files.say_uncached(files.cache_path("xla"), error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _heal_cache()


def _heal_cache() -> None:
    """Removes a damaged entry as JAX warns of it, because JAX would read it again at each start and
    never replaces it; and says in a line, once, what cannot be written.
    """
    show_others = warnings.showwarning

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        match = _JAX_WARNING.match(str(message))
        if not match:
            show_others(message, *args, **kwargs)
            return
        what, name, reason = match.groups()
        folder = Path(jax.config.values["jax_compilation_cache_dir"])
        if not os.path.isdir(folder):
            cli.say_once(f"warning: {folder} is not a folder: compiled programs are not kept")
            return
        if what == "writing":
            cli.say_once(f"warning: {folder}: compiled programs cannot be stored: {reason}")
            return
        for entry in folder.glob(f"{name}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
        cli.say_once(f"warning: {folder}: the entry of {name} was damaged; it is made anew")

    if getattr(show_others, "__name__", "") != show.__name__:
        warnings.showwarning = show
