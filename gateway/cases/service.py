"""The case service's parts, joined: what the routes ask for, each as one transaction or one acknowledged change.

Its own process, off the scoring path: gateways know nothing of it, and it knows them by Kafka's topics alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gateway.api_keys import KeyBook
from gateway.cases import labels, lists, reviews, webhook_queue
from gateway.cases.database import Database
from gateway.cases.errors import InvalidError, ListFullError
from gateway.cases.intake import Intake
from gateway.cases.metrics import CaseMetrics
from gateway.cases.outbox import Drainer, audit_record, put
from gateway.cases.policy_view import PolicyWatch
from gateway.cases.reviews import Filter, Order, Verdict
from gateway.cases.schemas import Schemas
from gateway.cases.webhook_file import load_webhooks
from gateway.cases.webhook_queue import WebhookQueue
from gateway.cases.webhooks import Deliverer, Delivering
from gateway.contracts.label import Label
from gateway.contracts.lists import (
    EXPIRES_AT_MS_MAX,
    ListAction,
    ListChange,
    ListChangeError,
    check_change,
)
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import LABELS
from gateway.errors import GatewayError
from gateway.kafka.avro import encode
from gateway.kafka.records import Record
from gateway.policy.document import ListDeclaration

log = logging.getLogger(__name__)

DATABASE_FILE = "cases/cases.sqlite"
HOUSEKEEPING_S = 60.0
FORGET_MAX = 5000
DAY_MS = 86_400_000
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class UnguardedError(GatewayError):
    """The service would be open to a network without asking for keys."""

    reason = "unguarded"


class CaseService:
    """`start` and `stop` on the event loop.

    Raises `PolicyRefusedError`, `WebhookFileError`, `KeyFileError`, `UnguardedError`, sqlite3.Error.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.api_keys_path and settings.host not in LOOPBACK:
            raise UnguardedError(
                "without FRAUDGATE_API_KEYS_PATH it listens on loopback alone: set that, or FRAUDGATE_HOST=127.0.0.1"
            )
        self.settings = settings
        self.metrics = CaseMetrics()
        self.policy = PolicyWatch(settings.policy_path)
        self.keys = KeyBook(Path(settings.api_keys_path).expanduser()) if settings.api_keys_path else None
        found = load_webhooks(settings.webhooks_path)
        self.schemas = Schemas(SchemaRegistry(settings.registry, settings.schemas_path))
        self.webhooks = WebhookQueue(
            found,
            self.metrics,
            queue_max=settings.webhook_queue_max,
            dedup_window_ms=settings.webhook_dedup_s * 1000,
            age_max_ms=settings.webhook_retry_max_s * 1000,
        )
        self.database = Database(settings.home_path / DATABASE_FILE)
        self.deliverer = Deliverer(
            self.database,
            self.webhooks,
            self.metrics,
            Delivering(
                timeout_s=settings.webhook_timeout_ms / 1000,
                attempts_max=settings.webhook_attempts_max,
                first_ms=settings.webhook_retry_first_ms,
                retry_max_ms=settings.webhook_retry_max_s * 1000,
                concurrency=settings.webhook_concurrency,
            ),
            settings.webhooks_path,
            now_ms=now_ms,
        )
        self.drainer = Drainer(self.database, self.schemas, self.metrics, settings.bootstrap)
        self.publisher = lists.ListPublisher(self.schemas, settings.bootstrap)
        self.ready = False
        self._intake: Intake | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Ready when this returns, with or without Kafka."""
        settings, loop = self.settings, asyncio.get_running_loop()
        self._intake = Intake(
            self.database,
            self.schemas,
            self.metrics,
            self.webhooks,
            lambda: self.policy.view,
            bootstrap=settings.bootstrap,
            group=settings.cases_group,
            reviews_max=settings.cases_reviews_max,
            now_ms=now_ms,
            told=partial(self._tell, loop),
        )
        self._intake.start()
        self.drainer.start()
        forever = [self.policy.watch(), self._keep_house(), self.deliverer.run()]
        if self.keys is not None:
            forever.append(self.keys.watch())
        self._tasks = [asyncio.create_task(work) for work in forever]
        self.ready = True
        log.info("cases: ready on port %d", settings.cases_port)

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """From the intake's thread, which ends before the loop does."""
        loop.call_soon_threadsafe(self.deliverer.wake)

    @property
    def well(self) -> bool:
        """Started, and every part of it runs."""
        threads = self._intake is not None and self._intake.alive and self.drainer.alive
        return self.ready and threads and not any(task.done() for task in self._tasks)

    async def stop(self) -> None:
        """Nothing is lost: what waits stays in the database."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._intake is not None:
            await asyncio.to_thread(self._intake.stop)
            await asyncio.to_thread(self.drainer.stop)
        await asyncio.to_thread(self.database.close)
        log.info("cases: stopped")

    # Reviews.

    async def list_reviews(
        self, wanted: Filter, order: Order, limit: int, cursor: str | None
    ) -> tuple[list[dict[str, Any]], str | None]:
        return await self.database.run(lambda c: reviews.page(c, wanted, order, limit, cursor, now_ms()))

    async def review(self, transaction_id: str) -> dict[str, Any]:
        """A review, its story and its labels. What the rules tell an analyst is the policy's of now."""
        summary, story, known = await self.database.run(
            lambda c: (*reviews.get(c, transaction_id, now_ms()), labels.of(c, transaction_id))
        )
        texts = self.policy.view.texts
        lists_texts = {list_id: d.text for list_id, d in self.policy.view.lists.items()}
        told = {hit: texts.get(hit, "") for hit in story["rule_hits"]} | {
            hit: lists_texts.get(hit, "") for hit in story["list_hits"]
        }
        return {"review": summary, "story": story, "texts": told, "labels": known}

    async def claim(self, transaction_id: str, who: str, lease_s: int) -> dict[str, Any]:
        at_ms = now_ms()
        return await self.database.run(lambda c: reviews.claim(c, transaction_id, who, at_ms + lease_s * 1000, at_ms))

    async def release(self, transaction_id: str, who: str) -> dict[str, Any]:
        return await self.database.run(lambda c: reviews.release(c, transaction_id, who, now_ms()))

    async def decide(self, transaction_id: str, who: str, verdict: Verdict, note: str) -> dict[str, Any]:
        """Verdict, label and audit record in one transaction. Raises what `reviews.decide` does, and `OutboxFullError`."""
        labels.check_text(note, "note")
        at_ms = now_ms()

        def work(connection: sqlite3.Connection) -> tuple[dict[str, Any], bool]:
            review, new = reviews.decide(connection, transaction_id, who, verdict, note, at_ms)
            if new:
                fraud = verdict == "fraud"
                label = Label(
                    transaction_id=transaction_id,
                    card_id=review["card_id"],
                    is_fraud=fraud,
                    source="analyst",
                    state="confirmed" if fraud else "false_positive",
                    # A payment from a clock ahead of ours isn't judged before it happened.
                    reported_at_ms=max(at_ms, review["event_time_ms"]),
                    amount_minor=review["amount_minor"],
                )
                self._take_labels(connection, [label], who, at_ms, "review_decided", note)
            return review, new

        review, new = await self.database.run(work)
        if new:
            self.drainer.wake()
            self.metrics.verdicts.labels(verdict).inc()
        return review

    # Labels.

    async def add_labels(self, found: Sequence[Label], who: str, reason: str) -> int:
        """How many were new; all are taken or none. Raises `InvalidError`, `OutboxFullError`."""
        at_ms = now_ms()
        for i, label in enumerate(found):
            labels.check(label, at_ms, f"labels[{i}].")
        labels.check_text(reason, "reason")
        new = await self.database.run(lambda c: self._take_labels(c, found, who, at_ms, "label_added", reason))
        self.drainer.wake()
        return new

    async def labels_of(self, transaction_id: str) -> list[dict[str, Any]]:
        return await self.database.run(lambda c: labels.of(c, transaction_id))

    def _take_labels(
        self, connection: sqlite3.Connection, found: Sequence[Label], who: str, at_ms: int, action: str, reason: str
    ) -> int:
        """Those that aren't known, with their audit records, into the database and the outbox."""
        records: list[Record] = []
        for label in found:
            if not labels.keep(connection, label, who, at_ms):
                continue
            self.metrics.labels.labels(label.source, label.state).inc()
            fields = msgspec.structs.asdict(label)
            records.append(Record(LABELS, label.card_id.encode(), encode(LABELS, fields)))
            after = msgspec.json.encode(fields).decode()
            records.append(audit_record(at_ms, who, action, label.transaction_id, None, after, reason))
        put(connection, records, self.settings.cases_outbox_max)
        return len(records) // 2

    # Lists.

    async def lists(self) -> list[dict[str, Any]]:
        held = await self.database.run(lists.counts)
        return [
            {"id": d.id, "field": d.field, "kind": d.kind.value, "owner": d.owner, "text": d.text, "entries": held.get(d.id, 0)}
            for d in self.policy.view.lists.values()
        ]

    async def entries(self, list_id: str, limit: int, after: str | None) -> tuple[list[dict[str, Any]], str | None]:
        self._declared(list_id)
        return await self.database.run(lambda c: lists.page(c, list_id, limit, after))

    async def add_entry(self, list_id: str, value: str, expires_at_ms: int | None, reason: str, who: str) -> int:
        """The version of the lists with it. Raises `InvalidError`, `ListFullError`, `KafkaUnavailableError`, `OutboxFullError`."""
        at_ms = now_ms()
        if expires_at_ms is not None and not at_ms < expires_at_ms <= EXPIRES_AT_MS_MAX:
            raise InvalidError("expires_at_ms", "must lie ahead, or be null")
        change = self._change(list_id, ListAction.ADD, value, expires_at_ms, reason, who, at_ms)
        if not await self.database.run(lambda c: lists.has_room(c, list_id, value)):
            raise ListFullError
        return await self._apply(change)

    async def remove_entry(self, list_id: str, value: str, reason: str, who: str) -> int:
        """The version of the lists without it. What doesn't stand there is removed all the same: others may have added it just now."""
        return await self._apply(self._change(list_id, ListAction.REMOVE, value, None, reason, who, now_ms()))

    def _declared(self, list_id: str) -> ListDeclaration:
        declared = self.policy.view.lists.get(list_id)
        if declared is None:
            raise InvalidError("list_id", "is not a list of the policy", "unknown_list")
        return declared

    def _change(
        self, list_id: str, action: ListAction, value: str, expires_at_ms: int | None, reason: str, who: str, at_ms: int
    ) -> ListChange:
        declared = self._declared(list_id)
        lists.check_entity(declared.field, value)
        labels.check_text(reason, "reason")
        try:
            return check_change(
                ListChange(
                    list_id=list_id,
                    entity_field=declared.field,
                    action=action,
                    entity_value=value,
                    expires_at_ms=expires_at_ms,
                    reason=reason,
                    who=who,
                    at_ms=at_ms,
                )
            )
        except ListChangeError as exc:
            raise InvalidError("entry", str(exc)) from exc

    async def _apply(self, change: ListChange) -> int:
        before = await self.database.run(lambda c: lists.entry(c, change.list_id, change.entity_value))
        version = await asyncio.to_thread(self.publisher.send, change)
        added = change.action is ListAction.ADD
        state = {"entity_value": change.entity_value, "expires_at_ms": change.expires_at_ms}
        record = audit_record(
            change.at_ms,
            change.who,
            "list_entry_added" if added else "list_entry_removed",
            change.list_id,
            None if before is None else _text({name: before[name] for name in state}),
            _text(state) if added else None,
            change.reason,
            {"version": version, "entity_field": change.entity_field, "entity_value": change.entity_value},
        )
        # The change itself is in Kafka: its audit record may wait behind whatever else does.
        await self.database.run(lambda c: put(c, [record], 2 * self.settings.cases_outbox_max))
        self.drainer.wake()
        self.metrics.list_changes.labels(change.action.value).inc()
        return version

    # Dead letters.

    async def dead_letters(self, limit: int, after: int, webhook: str | None) -> tuple[list[dict[str, Any]], int | None]:
        return await self.database.run(lambda c: webhook_queue.dead_page(c, limit, after, webhook))

    async def retry_dead_letter(self, seq: int, who: str) -> None:
        await self._dead_letter(seq, who, "dead_letter_retried")
        self.deliverer.wake()

    async def discard_dead_letter(self, seq: int, who: str) -> None:
        await self._dead_letter(seq, who, "dead_letter_discarded")

    async def _dead_letter(self, seq: int, who: str, action: str) -> None:
        at_ms = now_ms()

        def work(connection: sqlite3.Connection) -> None:
            retried = action == "dead_letter_retried"
            webhook = webhook_queue.retry(connection, seq, at_ms) if retried else webhook_queue.discard(connection, seq)
            put(
                connection, [audit_record(at_ms, who, action, webhook, None, None, "", {"id": seq})], self.settings.cases_outbox_max
            )

        await self.database.run(work)
        self.drainer.wake()

    async def _keep_house(self) -> None:
        """Remove what is older than it needs to be, a bit at a time, until cancelled."""
        while True:
            before_ms = now_ms() - self.settings.cases_retention_days * DAY_MS
            told_before_ms = now_ms() - self.settings.webhook_dedup_s * 1000
            with contextlib.suppress(sqlite3.Error):
                await self.database.run(partial(self.webhooks.give_up, now_ms=now_ms()))
            forgets = ((reviews.forget, before_ms), (labels.forget, before_ms), (webhook_queue.forget, told_before_ms))
            more = False
            for forget, at_ms in forgets:
                try:
                    gone = await self.database.run(partial(forget, before_ms=at_ms, most=FORGET_MAX))
                except sqlite3.Error as exc:
                    log.warning("cases: what is old can't be removed: %r", exc)
                    break
                more |= gone == FORGET_MAX
            await asyncio.sleep(1.0 if more else HOUSEKEEPING_S)


def _text(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


def now_ms() -> int:
    return time.time_ns() // 1_000_000
