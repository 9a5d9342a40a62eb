"""Reads `decisions`, `alerts` and `list_changes`, in one thread: reviews to queue, messages for webhooks, who stands on which list.

Decisions and alerts come by a consumer group of our own and are committed after the database has them: at least once, and the database
takes a transaction_id once. `list_changes` is read from where the database stands, noted in the same transaction: exactly once. While as
many reviews are open as the setting `cases_reviews_max` allows, nothing is taken in: Kafka keeps it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from gateway.cases import lists, reviews
from gateway.cases.database import Database, note_progress, progress_of
from gateway.cases.metrics import CaseMetrics
from gateway.cases.policy_view import PolicyView, webhooks_for
from gateway.cases.reviews import Queued
from gateway.cases.schemas import Schemas, UnreadableError
from gateway.cases.story import story_of
from gateway.cases.webhook_queue import Told, WebhookQueue
from gateway.contracts.decision import Outcome
from gateway.contracts.lists import ListChange, ListChangeError, change_of_fields
from gateway.contracts.registry import RegistryUnavailableError
from gateway.contracts.topics import ALERTS, DECISIONS, LIST_CHANGES

log = logging.getLogger(__name__)

BATCH_MAX = 500
POLL_S = 0.3
PAUSE_S = 1.0
# Before decisions get their turn again.
CHANGES_BATCHES_MAX = 50
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 10.0
SESSION_TIMEOUT_MS = 10_000
LISTS_AT = "list_changes"
WHY_REVIEW, WHY_WATCH = "review", "watch_list"
DECISION_KIND = "decision"


class Intake:
    """`now_ms` is the wall clock. `told` wakes whoever delivers to webhooks."""

    def __init__(
        self,
        database: Database,
        schemas: Schemas,
        metrics: CaseMetrics,
        webhooks: WebhookQueue,
        view: Callable[[], PolicyView],
        *,
        bootstrap: str,
        group: str,
        reviews_max: int,
        now_ms: Callable[[], int],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._schemas = schemas
        self._metrics = metrics
        self._webhooks = webhooks
        self._view = view
        self._reviews_max = reviews_max
        self._now_ms = now_ms
        self._told = told
        self._options: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "queued.max.messages.kbytes": 16_384,
            "reconnect.backoff.max.ms": 1000,
            "log_level": 0,
            "error_cb": _ignore,
        }
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cases-intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        retry_s = RETRY_FIRST_S
        while not self._stopping.is_set():
            group, changes = Consumer(self._options), Consumer(self._options | {"group.id": f"{self._options['group.id']}-lists"})
            try:
                self._read_forever(group, changes)
                retry_s = RETRY_FIRST_S
            except (KafkaException, RegistryUnavailableError, sqlite3.Error) as exc:
                log.warning("cases: reading stopped (%s), a new try in %.0f s", exc, retry_s)
            finally:
                self._metrics.connected.set(0)
                for consumer in (group, changes):
                    consumer.close()
            self._stopping.wait(retry_s)
            retry_s = min(RETRY_MAX_S, retry_s * 2)

    def _read_forever(self, group: Consumer, changes: Consumer) -> None:
        group.subscribe([DECISIONS, ALERTS], on_assign=lambda *_: self._metrics.connected.set(1))
        changes.assign([TopicPartition(LIST_CHANGES, 0, self._database.call(lambda c: progress_of(c, LISTS_AT)))])
        while not self._stopping.is_set():
            for _ in range(CHANGES_BATCHES_MAX):
                if not self._take_changes(_records(changes.consume(BATCH_MAX, 0))):
                    break
            opened = self._database.call(reviews.open_count)
            self._metrics.open.set(opened)
            full = opened >= self._reviews_max
            self._metrics.paused.set(full)
            if full:
                # Not read, so not lost. A pause keeps the membership alive by polling.
                group.pause(group.assignment())
            elif group.assignment():
                group.resume(group.assignment())
            messages = _records(group.consume(min(BATCH_MAX, max(1, self._reviews_max - opened)), PAUSE_S if full else POLL_S))
            if messages:
                self.take(messages)
                ends = {(m.topic(), m.partition()): m.offset() + 1 for m in messages}
                group.commit(offsets=[TopicPartition(t, p, offset) for (t, p), offset in ends.items()], asynchronous=False)

    def take(self, messages: list[Message]) -> None:
        """Decisions and alerts into the database, in one transaction. Raises `RegistryUnavailableError`: nothing was taken then."""
        view, now_ms = self._view(), self._now_ms()
        queued: list[Queued] = []
        told: list[Told] = []
        for message in messages:
            topic = message.topic() or ""
            self._metrics.read.labels(topic).inc()
            try:
                fields = self._schemas.read(topic, message.value())
                if topic == DECISIONS:
                    found = review_of(fields, view)
                    if found is not None:
                        queued.append(found)
                    told += told_of_decision(fields, view)
                elif fields["kind"] != DECISION_KIND:
                    # A decision's webhooks follow from its receipt, which says by which rules and lists it came about.
                    told += self._webhooks.told_of_alert(fields)
            except (UnreadableError, KeyError, TypeError, ValueError) as exc:
                self._metrics.unreadable.labels(topic).inc()
                log.warning("cases: %s %s/%s can't be read: %s", topic, message.partition(), message.offset(), type(exc).__name__)

        def work(connection: sqlite3.Connection) -> tuple[list[Queued], int]:
            return reviews.add(connection, queued, now_ms), self._webhooks.add(connection, told, now_ms)

        added, messages_added = self._database.call(work) if queued or told else ([], 0)
        for q in added:
            self._metrics.queued.labels(q.why).inc()
        if messages_added:
            self._told()

    def _take_changes(self, messages: list[Message]) -> bool:
        """False when there are none."""
        if not messages:
            return False
        found: list[ListChange] = []
        for message in messages:
            self._metrics.read.labels(LIST_CHANGES).inc()
            try:
                found.append(change_of_fields(self._schemas.read(LIST_CHANGES, message.value(), plain=True)))
            except (UnreadableError, ListChangeError) as exc:
                self._metrics.unreadable.labels(LIST_CHANGES).inc()
                log.warning("cases: %s/%s can't be read: %s", LIST_CHANGES, message.offset(), type(exc).__name__)
        last = messages[-1].offset()
        assert last is not None

        def work(connection: sqlite3.Connection) -> None:
            lists.apply(connection, found)
            note_progress(connection, LISTS_AT, last + 1)

        self._database.call(work)
        return True


def review_of(receipt: Mapping[str, Any], view: PolicyView) -> Queued | None:
    """The review that a decision needs: its outcome asks for one, or it hit a watch list. None for all others."""
    reviewed = receipt["decision"] == Outcome.REVIEW.value
    if not reviewed and view.watched.isdisjoint(receipt.get("list_hits", ())):
        return None
    t = receipt["transaction"]
    return Queued(
        transaction_id=receipt["transaction_id"],
        why=WHY_REVIEW if reviewed else WHY_WATCH,
        outcome=receipt["decision"],
        risk_score=receipt["risk_score"],
        amount_minor=t["amount_minor"],
        currency=t["currency"],
        card_id=t["card_id"],
        customer_id=t["customer_id"],
        merchant_id=t["merchant_id"],
        event_time_ms=t["event_time_ms"],
        decided_at_ms=receipt["decided_at_ms"],
        story=msgspec.json.encode(story_of(receipt)),
    )


def told_of_decision(receipt: Mapping[str, Any], view: PolicyView) -> list[Told]:
    """A message for each webhook that the policy's routes lead a decision to."""
    t = receipt["transaction"]
    hits = list(receipt["rule_hits"]), list(receipt.get("list_hits", ()))
    by_webhook = webhooks_for(view.routes, Outcome(receipt["decision"]), *hits, t["amount_minor"])
    if not by_webhook:
        return []
    data = {
        "transaction_id": receipt["transaction_id"],
        "card_id": t["card_id"],
        "customer_id": t["customer_id"],
        "merchant_id": t["merchant_id"],
        "amount_minor": t["amount_minor"],
        "currency": t["currency"],
        "event_time_ms": t["event_time_ms"],
        "decision": receipt["decision"],
        "risk_score": receipt["risk_score"],
        "reasons": list(receipt["reasons"]),
        "rule_hits": hits[0],
        "list_hits": hits[1],
        "decided_at_ms": receipt["decided_at_ms"],
    }
    return [
        Told(webhook, DECISION_KIND, receipt["transaction_id"], receipt["decided_at_ms"], data | {"routes": routes})
        for webhook, routes in by_webhook.items()
    ]


def _records(messages: list[Message]) -> list[Message]:
    """Those without an error. Raises KafkaException for an error that doesn't pass by itself."""
    found = []
    for message in messages:
        error = message.error()
        if error is None:
            found.append(message)
        elif error.fatal() or error.code() == KafkaError._MAX_POLL_EXCEEDED:
            raise KafkaException(error)
        else:
            log.debug("cases: %s", error)
    return found


def _ignore(error: KafkaError) -> None:
    """What passes by itself."""
