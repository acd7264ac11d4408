"""Numbers for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

if TYPE_CHECKING:
    from .pool import Pool
    from .texts import Asked

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter(
            "tinyllm_requests", "Requests by route and status", ["route", "status"], registry=r
        )
        self.running = Gauge("tinyllm_requests_running", "Requests being answered", registry=r)
        self.seconds = Histogram(
            "tinyllm_request_seconds", "Seconds of a request that writes texts",
            buckets=SECONDS, registry=r,
        )  # fmt: skip
        self.first = Histogram(
            "tinyllm_first_token_seconds", "Seconds to the first token", buckets=SECONDS, registry=r
        )
        self.read = Counter("tinyllm_prompt_tokens", "Tokens of prompts", ["model"], registry=r)
        self.cached = Counter(
            "tinyllm_cached_tokens", "Tokens of prompts found computed", ["model"], registry=r
        )
        self.written = Counter("tinyllm_generated_tokens", "Tokens written", ["model"], registry=r)
        self.texts = Gauge("tinyllm_texts", "Texts being written or waiting", ["model"], registry=r)
        self.loaded = Gauge(
            "tinyllm_model_loaded", "1 while a model is loaded", ["model"], registry=r
        )

    def began(self) -> None:
        """Count a request that has come."""
        self.running.inc()

    def ended(self, scope: Scope, status: int, seconds: float, asked: Asked | None) -> None:
        """Count a request that was answered."""
        self.running.dec()
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(route, str(status)).inc()
        if asked is None:
            return
        self.seconds.observe(seconds)
        if asked.first_at is not None:
            self.first.observe(asked.first_at - asked.began)
        name, usage = asked.served.name, asked.usage
        self.read.labels(name).inc(usage["prompt_tokens"])
        self.cached.labels(name).inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.written.labels(name).inc(usage["completion_tokens"])

    def text(self, pool: Pool) -> bytes:
        """The exposition that Prometheus reads."""
        for served in pool:
            self.texts.labels(served.name).set(served.n_texts)
            self.loaded.labels(served.name).set(served.loaded)
        return generate_latest(self.registry)
