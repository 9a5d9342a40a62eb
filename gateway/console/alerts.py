"""The topic `alerts` as the console shows it: a consumer without group, in a thread of its own while somebody watches.

It begins a little before the end of each partition and keeps a few. In a storm of declines it reads ALERTS_PER_ROUND_MAX a round and leaps
over what it is behind: the page shows what is new, the topic keeps all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from gateway.cases.schemas import Schemas, UnreadableError
from gateway.contracts.registry import RegistryUnavailableError
from gateway.contracts.topics import ALERTS

log = logging.getLogger(__name__)

KEPT_DECLINES, KEPT_OTHERS = 20, 50
TAIL_RECORDS = 50
ALERTS_PER_ROUND_MAX = 200
BEHIND_MAX = 1000
ROUND_S = 0.5
ASK_TIMEOUT_S = 3.0
RETRY_S = 2.0
JOIN_S = 5.0
DECISION_KIND = "decision"


class AlertFollower:
    """`start` and `stop` as often as wanted. What it has stays, with `heard_s` (monotonic) when Kafka last answered."""

    def __init__(self, bootstrap: str, schemas: Schemas) -> None:
        self._bootstrap = bootstrap
        self._schemas = schemas
        self._lock = threading.Lock()
        self._declines: deque[dict[str, Any]] = deque(maxlen=KEPT_DECLINES)
        self._others: deque[dict[str, Any]] = deque(maxlen=KEPT_OTHERS)
        self._places: dict[int, int] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        # Grows with each alert that is kept.
        self.version = 0
        self.skipped = 0
        self.heard_s: float | None = None
        self.trouble: str | None = None

    def start(self) -> None:
        if self._thread is None:
            self._stopping = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stopping,), name="console-alerts", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Asks it to end; it does within a round or a question's time, and nobody waits for it."""
        self._stopping.set()
        self._thread = None

    def close(self) -> None:
        """Ends it for good. Blocks for JOIN_S seconds at most."""
        thread = self._thread
        self.stop()
        if thread is not None:
            thread.join(JOIN_S)

    def newest(self) -> list[dict[str, Any]]:
        """All that is kept, the newest first."""
        with self._lock:
            return sorted([*self._declines, *self._others], key=lambda alert: -alert["decided_at_ms"])

    def take(self, messages: list[Message]) -> None:
        """Keep what a round brought. Raises `RegistryUnavailableError`."""
        for message in messages:
            if message.error() is not None:
                continue
            try:
                fields = self._schemas.read(ALERTS, message.value())
            except UnreadableError:
                self.skipped += 1
                continue
            alert = {name: fields[name] for name in ("transaction_id", "merchant_id", "decision", "risk_score", "reasons")}
            alert |= {"kind": fields["kind"], "detail": fields["detail"], "decided_at_ms": fields["decided_at_ms"]}
            alert["id"] = f"{message.partition()}-{message.offset()}"
            with self._lock:
                (self._declines if alert["kind"] == DECISION_KIND else self._others).append(alert)
                self.version += 1

    def _run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                self._follow(stopping)
            except (KafkaException, RegistryUnavailableError) as exc:
                self.trouble = (
                    "the registry doesn't answer" if isinstance(exc, RegistryUnavailableError) else "Kafka doesn't answer"
                )
            except Exception:
                # A bug here must not take the thread of a screen down in silence.
                log.exception("console: the alerts could not be followed")
                self.trouble = "a failure, see the log"
            stopping.wait(RETRY_S)

    def _follow(self, stopping: threading.Event) -> None:
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                # Never joined, nothing is committed: librdkafka wants a name.
                "group.id": "fraudgate-console",
                "enable.auto.commit": False,
                "auto.offset.reset": "latest",
                "isolation.level": "read_committed",
                "queued.max.messages.kbytes": 1024,
                "fetch.wait.max.ms": 500,
                "reconnect.backoff.max.ms": 1000,
                "log_level": 0,
                "error_cb": lambda _: None,
            }
        )
        try:
            self._assign(consumer)
            asked_s = time.monotonic()
            while not stopping.is_set():
                # In its own wait it holds no lock of Python's.
                self.take(consumer.consume(ALERTS_PER_ROUND_MAX, ROUND_S))
                for place in consumer.position(consumer.assignment()):
                    if place.offset >= 0:
                        self._places[place.partition] = place.offset
                if time.monotonic() - asked_s > ASK_TIMEOUT_S:
                    self._keep_up(consumer)
                    asked_s = time.monotonic()
        finally:
            consumer.close()

    def _assign(self, consumer: Consumer) -> None:
        """From where it was, or a little before the end. Raises KafkaException."""
        found = consumer.list_topics(ALERTS, timeout=ASK_TIMEOUT_S).topics[ALERTS]
        assigned = []
        for partition in found.partitions:
            low, end = _edges(consumer, partition)
            self._places.setdefault(partition, max(low, end - TAIL_RECORDS))
            if not max(low, end - BEHIND_MAX) <= self._places[partition] <= end:
                self._places[partition] = max(low, end - TAIL_RECORDS)
            assigned.append(TopicPartition(ALERTS, partition, self._places[partition]))
        consumer.assign(assigned)
        self.heard_s, self.trouble = time.monotonic(), None

    def _keep_up(self, consumer: Consumer) -> None:
        """See that Kafka is there, and leap where too much is ahead. Raises KafkaException."""
        for partition, place in list(self._places.items()):
            _, end = _edges(consumer, partition)
            if end - place > BEHIND_MAX:
                self.skipped += end - TAIL_RECORDS - place
                self._places[partition] = end - TAIL_RECORDS
                consumer.seek(TopicPartition(ALERTS, partition, end - TAIL_RECORDS))
        self.heard_s, self.trouble = time.monotonic(), None


def _edges(consumer: Consumer, partition: int) -> tuple[int, int]:
    """First and next offset. Raises KafkaException."""
    found = consumer.get_watermark_offsets(TopicPartition(ALERTS, partition), timeout=ASK_TIMEOUT_S)
    if found is None:
        raise KafkaException("no answer")
    low, end = found
    return low, end
