"""Figures of what is served, by model name, in Prometheus's form."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rankwise.serve.engine import Engine, Generation, Meter

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Meter):
    """Counters that the engine moves."""

    def __init__(self, base: str) -> None:
        self.registry = CollectorRegistry()
        self._base = base
        self._requests = Counter(
            "rankwise_requests", "Answers ended, by outcome", ["model", "outcome"], registry=self.registry
        )
        self._tokens = Counter("rankwise_tokens", "Tokens read and written", ["model", "kind"], registry=self.registry)
        self._first = Histogram(
            "rankwise_time_to_first_token_seconds",
            "From the request to its first token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def first_token(self, generation: Generation, seconds: float) -> None:
        """A prompt has been read."""
        name = self.name_of(generation)
        self._first.labels(name).observe(seconds)
        self._tokens.labels(name, "prompt").inc(len(generation.prompt))

    def ended(self, generation: Generation, outcome: str, tokens: int) -> None:
        """An answer ended."""
        name = self.name_of(generation)
        self._requests.labels(name, outcome).inc()
        self._tokens.labels(name, "answer").inc(tokens)

    def name_of(self, generation: Generation) -> str:
        """The name that the request gave."""
        return generation.adapter.name if generation.adapter else self._base

    def watch(self, engine: Engine) -> None:
        """Show an engine's state beside the counters."""
        self.registry.register(_State(self, engine))

    def text(self) -> bytes:
        """All figures as they stand."""
        return generate_latest(self.registry)


class _State(Collector):
    """What runs, waits and lies in memory, looked up when it is asked for."""

    def __init__(self, metrics: Metrics, engine: Engine) -> None:
        self._metrics, self._engine = metrics, engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running, waiting = self._engine.running, self._engine.waiting
        yield _gauge("rankwise_requests_running", "Answers under way", self._tally(running))
        yield _gauge("rankwise_requests_waiting", "Requests that wait for a row", self._tally(waiting))
        sizes: Tally[str] = Tally()
        for adapter in self._engine.store.loaded:  # two of one name, where one was unloaded and answers still
            sizes[adapter.name] += adapter.size
        yield _gauge("rankwise_adapter_loaded_bytes", "Memory of the adapters that are loaded", sizes)

    def _tally(self, generations: list[Generation]) -> Tally[str]:
        return Tally(map(self._metrics.name_of, generations))


def _gauge(name: str, text: str, values: Tally[str]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=["model"])
    for model, value in values.items():
        gauge.add_metric([model], value)
    return gauge
