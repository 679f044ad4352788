"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

NAME = "rolling_diffusion"
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """A registry of its own: nothing else in the process is told."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        """waiting: how many requests stand in line now."""
        kept = self.registry = CollectorRegistry()
        self.requests = Counter(f"{NAME}_requests", "Requests answered", ("route", "status"), registry=kept)
        self.pictures = Counter(f"{NAME}_pictures", "Pictures finished", registry=kept)
        self.stopped = Counter(f"{NAME}_stopped", "Requests whose connection closed before the end", registry=kept)
        self.failed = Counter(f"{NAME}_failed", "Requests that failed while drawing", registry=kept)
        self.calls = Counter(f"{NAME}_calls", "Calls of the model", registry=kept)
        self.seconds = Histogram(
            f"{NAME}_picture_seconds", "Seconds that a picture took to draw", buckets=SECONDS, registry=kept
        )
        self.waited = Histogram(
            f"{NAME}_wait_seconds", "Seconds that a request stood in line", buckets=SECONDS, registry=kept
        )
        Gauge(f"{NAME}_queue", "Requests in line, the one that is drawn included", registry=kept).set_function(waiting)

    def page(self) -> bytes:
        return generate_latest(self.registry)
