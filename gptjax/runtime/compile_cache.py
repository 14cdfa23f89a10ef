"""TODO docstring."""

from __future__ import annotations

from typing import Any

import jax

from gptjax.core import files


class Compiles:
    """Counts XLA compilations and their seconds, and hits and misses of the cache on disk, from jax.monitoring."""

    def __init__(self) -> None:
        self.count, self.seconds, self.hits, self.misses = 0, 0.0, 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs

    def _event(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"


def enable_compile_cache() -> None:
    """Programs compiled once are read from disk afterwards; JAX_COMPILATION_CACHE_DIR is honoured."""
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
