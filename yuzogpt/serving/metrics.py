"""Prometheus metrics: requests, tokens, latencies, queue, weights, memory.

The metrics of several replicas are merged into one text, with a `replica` label.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "yuzogpt_requests",
            "Completion requests by final HTTP status; 499: the client disconnected",
            ["status"],
            registry=self.registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens")
        self.new_tokens = self._counter("new_tokens", "Generated tokens")
        self.first_token = self._histogram(
            "first_token_seconds", "Time from request to first token"
        )
        self.request = self._histogram("request_seconds", "Time from request to last token")
        self.token = self._histogram(
            "token_seconds", "Time between tokens of a choice", TOKEN_BUCKETS_S
        )
        self.running = self._gauge("running_requests", "Requests that have a slot")
        self.waiting = self._gauge("waiting_requests", "Requests that wait for a slot")
        self.slots = self._gauge("slots", "Maximum number of requests that run at a time")
        self.step = self._gauge("weights_step", "Training step of the weights")
        self.val_loss = self._gauge("weights_val_loss", "Estimate of their validation loss")

    def text(self) -> str:
        """Return Prometheus's text format."""
        return generate_latest(self.registry).decode()

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"yuzogpt_{name}", meaning, registry=self.registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"yuzogpt_{name}", meaning, registry=self.registry)

    def _histogram(
        self, name: str, meaning: str, buckets: tuple[float, ...] = REQUEST_BUCKETS_S
    ) -> Histogram:
        return Histogram(f"yuzogpt_{name}", meaning, buckets=buckets, registry=self.registry)


class MergedCollector(Collector):
    """The metrics of several replicas, each labelled with its replica's name."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        """Return each metric once, with the samples of all replicas."""
        metrics: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                metric = Metric(family.name, family.documentation, family.type)
                merged = metrics.setdefault(family.name, metric)
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    merged.samples.append(sample._replace(labels=labels))
        return metrics.values()


def merge(texts: Mapping[str, str]) -> str:
    """Merge the metrics of several replicas into one text."""
    registry = CollectorRegistry()
    registry.register(MergedCollector(texts))
    return generate_latest(registry).decode()
