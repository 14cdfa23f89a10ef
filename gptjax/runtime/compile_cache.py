"""JAX's compile cache on disk, and a counter of compilations."""

from __future__ import annotations

from typing import Any

import jax

from gptjax.core import files


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

    In the folder of JAX_COMPILATION_CACHE_DIR if it is set, else in our cache folder. Programs that
    compile faster than 0.2 s are not stored.
    """
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
