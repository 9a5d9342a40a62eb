"""Prometheus metrics of the feature jobs. Names are spelled here; dashboards and alerts use them."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BATCH_SECONDS_BUCKETS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)


@dataclass
class Metrics:
    """One set a process. `registry` is what the metrics port serves."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        r = self.registry
        self.rows = Counter("fraudgate_jobs_rows", "Rows written, by table", ["table"], registry=r)
        self.batch_seconds = Histogram(
            "fraudgate_jobs_batch_seconds", "Time of one micro-batch", ["query"], registry=r, buckets=BATCH_SECONDS_BUCKETS
        )
        self.freshness_seconds = Gauge(
            "fraudgate_jobs_freshness_seconds",
            "Age of the oldest Kafka record of the last batch when the batch was written",
            ["query"],
            registry=r,
        )
        self.quarantined = Counter("fraudgate_jobs_quarantined", "Records refused, by reason", ["reason"], registry=r)
        self.duplicates = Counter("fraudgate_jobs_duplicates", "Records dropped because their transaction_id was seen", registry=r)
        self.late = Counter("fraudgate_jobs_late", "Records dropped behind the watermark: never expected", registry=r)
        self.entities = Counter("fraudgate_jobs_tiles_written", "Entities whose tiles were written to Redis", registry=r)
        self.rebuilds = Counter("fraudgate_jobs_tiles_rebuilt", "Times that tiles were rebuilt from silver", registry=r)
        self.label_values = Counter("fraudgate_jobs_labels_written", "Entities whose frauds were written to Redis", registry=r)
        self.label_rebuilds = Counter(
            "fraudgate_jobs_labels_rebuilt", "Times that frauds were rebuilt from the label changes", registry=r
        )
        self.labels_unmatched = Counter(
            "fraudgate_jobs_labels_unmatched", "Labels whose payment was not there when they came", registry=r
        )
        self.labels_waiting = Gauge("fraudgate_jobs_labels_waiting", "Labels that are tried again with each batch", registry=r)
        self.restarts = Counter(
            "fraudgate_jobs_restarts", "Failures of a query that the supervisor restarted", ["query"], registry=r
        )
        self.up = Gauge("fraudgate_jobs_up", "1 while the query runs", ["query"], registry=r)
        self.lag = Gauge("fraudgate_jobs_kafka_lag", "Records in Kafka that bronze doesn't hold yet", registry=r)
        self.state_rows = Gauge(
            "fraudgate_jobs_state_rows", "Ids that a query remembers to drop repetitions", ["query"], registry=r
        )
        self.state_memory = Gauge(
            "fraudgate_jobs_state_memory_bytes", "Memory of the store that holds them, bytes", ["query"], registry=r
        )
        self.drift_psi = Gauge(
            "fraudgate_jobs_drift_psi", "PSI against the training rows in the newest window, by measure", ["measure"], registry=r
        )
        self.drift_ks = Gauge(
            "fraudgate_jobs_drift_ks", "KS statistic against the training rows in the newest window", ["measure"], registry=r
        )
        self.drift_alarm = Gauge("fraudgate_jobs_drift_alarm", "1 while the measure is an alarm", ["measure"], registry=r)
        self.drift_alarms = Counter("fraudgate_jobs_drift_alarms", "Alarms that began", ["measure"], registry=r)
        self.drift_windows = Counter("fraudgate_jobs_drift_windows", "Windows that were compared", registry=r)
        self.drift_late = Counter("fraudgate_jobs_drift_late", "Receipts too late for their windows", registry=r)
        self.drift_stream_time = Gauge("fraudgate_jobs_drift_stream_time_seconds", "Event time that drift has come to", registry=r)
        self.drift_reference = Gauge(
            "fraudgate_jobs_drift_reference", "1 while the champion has training rows to compare with", registry=r
        )
        self.bursts = Counter("fraudgate_jobs_bursts", "Bursts of declines that began, by entity", ["entity"], registry=r)
        self.bursts_active = Gauge("fraudgate_jobs_bursts_active", "Bursts of declines that go on", registry=r)
        self.burst_entities = Gauge(
            "fraudgate_jobs_burst_entities", "Merchants, devices and BINs whose declines are remembered", registry=r
        )
        self.burst_evicted = Counter(
            "fraudgate_jobs_burst_evicted", "Of those, forgotten to make room: their bursts may be missed", registry=r
        )

    def batch(self, query: str, seconds: float) -> None:
        self.batch_seconds.labels(query).observe(seconds)
