"""What the server counts, for Prometheus: requests, tokens, waiting times, joules and grams."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ecogen.serving.generation import Finish

# From a token of a small model on a good machine to a long prompt on a slow link.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")

# nginx's status for a request whose client went away.
CLIENT_GONE = 499


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ecogen_requests",
            "Requests that have ended, 499 where the client left",
            ["path", "status"],
            registry=registry,
        )
        self.running = Gauge("ecogen_requests_in_progress", "Requests that run", registry=registry)
        self.tokens_in = Counter("ecogen_prompt_tokens", "Tokens of prompts", registry=registry)
        self.tokens_out = Counter("ecogen_completion_tokens", "Tokens of answers", registry=registry)
        self.first = Histogram(
            "ecogen_time_to_first_token_seconds", "Until a choice's first token", buckets=_SECONDS, registry=registry
        )
        self.between = Histogram(
            "ecogen_time_between_tokens_seconds", "From a token to the next", buckets=_SECONDS, registry=registry
        )
        self.taken = Counter(
            "ecogen_answers_taken",
            "Choices that are the answer to another question that means the same",
            registry=registry,
        )
        self.joules = Counter("ecogen_energy_joules", "Modelled, of choices that were answered", registry=registry)
        self.grams = Counter("ecogen_emissions_grams", "CO2e, modelled, of the same", registry=registry)

    def token_timer(self) -> Callable[[], None]:
        """Call it as each token of a choice comes."""
        last_s = time.perf_counter()
        histogram = self.first

        def count() -> None:
            nonlocal last_s, histogram
            now_s = time.perf_counter()
            histogram.observe(now_s - last_s)
            self.tokens_out.inc()
            last_s, histogram = now_s, self.between

        return count

    def bill(self, finishes: Sequence[Finish | None]) -> None:
        """Count what choices took."""
        for finish in finishes:
            if finish is not None:
                self.joules.inc(finish.bill.energy_j.mid)
                self.grams.inc(finish.bill.emissions_g.mid)
                self.taken.inc(finish.taken is not None)

    def exposition(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class Counted:
    """Counts the requests of an application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.running.track_inprogress():
            try:
                await self._app(scope, receive, send_and_look)
            except Exception:
                status = 500
                raise
            finally:
                self._metrics.requests.labels(_known(scope["path"]), status).inc()


def _known(path: str) -> str:
    """A path as a label: whatever somebody may think of must not become one."""
    for known in ("/v1/models/", "/v1/adapters/"):
        if path.startswith(known):
            return f"{known}{{name}}"
    return path if path in _PATHS else "other"
