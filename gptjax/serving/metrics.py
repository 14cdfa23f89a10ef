"""What a Prometheus server reads at /metrics: queue, slots, tokens, latencies, requests.

A registry of its own, so that two servers in one process count apart.
"""

from __future__ import annotations

from typing import Any

from gptjax.config.errors import UserError

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The numbers of one server. Raises UserError without the library."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise UserError("a server needs prometheus_client: pip install gptjax[serve]") from None
        registry = self._registry = prometheus.CollectorRegistry()
        self._write = prometheus.generate_latest
        self.content_type = prometheus.CONTENT_TYPE_LATEST

        def gauge(name: str, meaning: str) -> Any:
            return prometheus.Gauge(f"gptjax_{name}", meaning, registry=registry)

        def counter(name: str, meaning: str, labels: tuple[str, ...] = ()) -> Any:
            return prometheus.Counter(f"gptjax_{name}", meaning, labels, registry=registry)

        def seconds(name: str, meaning: str) -> Any:
            return prometheus.Histogram(
                f"gptjax_{name}_seconds", meaning, registry=registry, buckets=_SECONDS
            )

        self.queue = gauge("queue_texts", "Texts that wait for a slot")
        self.slots = gauge("slots", "Slots")
        self.slots_used = gauge("slots_used", "Slots that hold a text")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that began")
        self.new_tokens = counter("new_tokens", "Tokens written")
        self.texts = counter("texts", "Texts that ended, by how", ("reason",))
        self.requests = counter("requests", "Requests, by path and status", ("path", "status"))
        self.wait = seconds("queue_wait", "From a request to its slot")
        self.first_token = seconds("time_to_first_token", "From a request to its first token")
        self.between_tokens = seconds("time_between_tokens", "Between two tokens of a text")
        self.request = seconds("request", "From a request to its last byte")

    def text(self) -> bytes:
        return bytes(self._write(self._registry))
