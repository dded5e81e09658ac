"""What /metrics says, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from engine.serve.store import CAPTION, COMPLETED, FAILED, QUEUED, RUNNING, VIDEO, Store

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800)


class Jobs:
    """The jobs of the table at the moment of the question, so that no gauge drifts from it."""

    def __init__(self, store: Store):
        self.store = store

    def collect(self):
        gauge = GaugeMetricFamily("univigu_jobs", "Jobs by kind and status", labels=KINDS)
        counts = self.store.counts()
        for kind in (VIDEO, CAPTION):
            for status in (QUEUED, RUNNING, COMPLETED, FAILED):
                gauge.add_metric((kind, status), counts.get((kind, status), 0))
        yield gauge


KINDS = ("kind", "status")


class Metrics:
    """The figures of one server since it started; the jobs are those of the table."""

    def __init__(self, store: Store, ready):
        self.registry = CollectorRegistry()
        self.registry.register(Jobs(store))
        own = {"registry": self.registry}
        self.ended = Counter(
            "univigu_jobs_ended", "Jobs that ended, by kind and code", ("kind", "code"), **own
        )
        self.stages = Histogram(
            "univigu_stage_seconds", "Seconds by stage", ("stage",), buckets=SECONDS, **own
        )
        self.batch = Histogram(
            "univigu_caption_batch", "Captions that ran together", buckets=(1, 2, 4, 8, 16), **own
        )
        self.refused = Counter("univigu_refused", "Requests refused, by code", ("code",), **own)
        self.restarts = Counter("univigu_runner_deaths", "Deaths of the runner", **own)
        self.ready = ready
        self.registry.register(self)

    def collect(self):
        yield GaugeMetricFamily("univigu_ready", "1: the model is loaded", int(self.ready()))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def hear(self, record: dict) -> None:
        """What the runner said."""
        if record["event"] == "died":
            self.restarts.inc()
        elif record["event"] == "ended":
            self.ended.labels(record["kind"], record["code"]).inc()
        elif record["event"] == "batch":
            self.batch.observe(record["size"])
        for stage, seconds in record.get("timings", {}).items():
            self.stages.labels(stage).observe(seconds)
