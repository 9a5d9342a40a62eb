"""The case service's metrics as objects: made from `gateway.contracts.metrics`, which says what each is."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from gateway.contracts import metrics as catalogue
from gateway.metrics import Instruments


class CaseMetrics(Instruments):
    """Each attribute is a line of `catalogue.CASES`."""

    queued: Counter
    open: Gauge
    verdicts: Counter
    labels: Counter
    list_changes: Counter
    refused: Counter
    outbox: Gauge
    outbox_delivered: Counter
    read: Counter
    unreadable: Counter
    paused: Gauge
    connected: Gauge
    webhook_queued: Counter
    webhook_duplicate: Counter
    webhook_old: Counter
    webhook_overflow: Counter
    webhook_delivered: Counter
    webhook_failed: Counter
    webhook_dead: Counter
    webhook_queue: Gauge

    def __init__(self) -> None:
        super().__init__(catalogue.CASES)

    def expect_webhook(self, name: str) -> None:
        """Counters of a webhook begin at 0, so that its first failure is seen as an increase."""
        for counter in (
            *(self.webhook_queued, self.webhook_duplicate, self.webhook_old, self.webhook_overflow),
            *(self.webhook_delivered, self.webhook_failed, self.webhook_dead),
        ):
            counter.labels(name)
