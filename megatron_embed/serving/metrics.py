"""Counters and gauges of a server, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from megatron_embed.serving.models import ServedModels

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
OTHER = "other"
"""Label of a path that is none of the server's, so that strangers cannot make new ones."""


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, models: ServedModels) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("megatron_embed_requests", "Requests answered, by path and status",
                                 ("path", "status"), registry=self.registry)
        self._seconds = Histogram("megatron_embed_request_seconds", "Time from a request's header to its answer",
                                  ("path",), buckets=SECONDS, registry=self.registry)
        self._texts = Counter("megatron_embed_texts", "Texts or pairs computed, by model", ("model",),
                              registry=self.registry)
        self._tokens = Counter("megatron_embed_tokens", "Tokens computed, by model", ("model",),
                               registry=self.registry)
        queue = models.queue
        Gauge("megatron_embed_waiting_texts", "Texts accepted and not yet answered",
              registry=self.registry).set_function(lambda: queue.waiting_texts)
        queue.batcher.on_batch = Histogram("megatron_embed_batch_tokens", "Tokens of a batch", buckets=TOKENS,
                                           registry=self.registry).observe
        for model in models.all:
            self._texts.labels(model.name)
            self._tokens.labels(model.name)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer; status 0: the client left before it."""
        path = scope["route"].path if "route" in scope else OTHER
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def computed(self, model: str, tokens: list[int]) -> None:
        """Count a request's texts. `tokens`: of each."""
        self._texts.labels(model).inc(len(tokens))
        self._tokens.labels(model).inc(sum(tokens))

    def text(self) -> bytes:
        return generate_latest(self.registry)
