"""Every metric of the case service, by name, in one place."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class CaseMetrics:
    """A registry of its own, so that each service in a test counts for itself."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.queued = Counter(
            "fraudgate_cases_reviews_queued_total", "decisions that were queued for a person", ["why"], registry=r
        )
        self.open = Gauge("fraudgate_cases_reviews_open", "reviews without a verdict", registry=r)
        self.verdicts = Counter("fraudgate_cases_verdicts_total", "reviews that were decided", ["verdict"], registry=r)
        self.labels = Counter("fraudgate_cases_labels_total", "labels that went to the outbox", ["source", "state"], registry=r)
        self.list_changes = Counter("fraudgate_cases_list_changes_total", "changes that Kafka acknowledged", ["action"], registry=r)
        self.refused = Counter("fraudgate_cases_refused_total", "requests that were answered by a problem", ["reason"], registry=r)
        self.outbox = Gauge("fraudgate_cases_outbox_records", "labels and audit records that wait for Kafka", registry=r)
        self.outbox_delivered = Counter("fraudgate_cases_outbox_delivered_total", "records that Kafka acknowledged", registry=r)
        self.read = Counter("fraudgate_cases_read_total", "records that were read from Kafka", ["topic"], registry=r)
        self.unreadable = Counter(
            "fraudgate_cases_unreadable_total", "records that can't be read and were left out", ["topic"], registry=r
        )
        self.paused = Gauge(
            "fraudgate_cases_intake_paused", "1 while as many reviews are open as may be, and none is taken in", registry=r
        )
        self.connected = Gauge("fraudgate_cases_kafka_connected", "1 while the case service has its partitions", registry=r)
        self.webhook_queued = Counter("fraudgate_webhook_queued_total", "messages to deliver", ["webhook"], registry=r)
        self.webhook_duplicate = Counter(
            "fraudgate_webhook_duplicate_total", "messages that were told already", ["webhook"], registry=r
        )
        self.webhook_old = Counter(
            "fraudgate_webhook_old_total", "messages that were too old to send when they were read", ["webhook"], registry=r
        )
        self.webhook_overflow = Counter(
            "fraudgate_webhook_overflow_total",
            "messages that went straight to the dead letters, the queue being full",
            ["webhook"],
            registry=r,
        )
        self.webhook_delivered = Counter("fraudgate_webhook_delivered_total", "messages that were taken", ["webhook"], registry=r)
        self.webhook_failed = Counter("fraudgate_webhook_failed_total", "attempts that failed", ["webhook"], registry=r)
        self.webhook_dead = Counter(
            "fraudgate_webhook_dead_total", "messages given up after their last attempt", ["webhook"], registry=r
        )
        self.webhook_queue = Gauge("fraudgate_webhook_queue", "messages that wait for delivery", ["webhook"], registry=r)

    def text(self) -> bytes:
        return generate_latest(self.registry)
