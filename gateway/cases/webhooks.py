"""Delivers messages to webhooks: signed after Standard Webhooks, tried again with growing pauses, never in anybody's way.

Each webhook has a lane of its own, which sends what is due, at most so many at a time, and writes down what became of it. A receiver that
hangs costs its own lane one timeout. aiohttp's client and not httpx, which isn't among the project's locked packages. Redirects are not
followed and no proxy is taken from the environment: what is called is what the operator wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import aiohttp

from gateway.cases.database import Database
from gateway.cases.metrics import CaseMetrics
from gateway.cases.webhook_file import Webhook, WebhookFileError, load_webhooks, signatures
from gateway.cases.webhook_queue import Delivery, WebhookQueue

log = logging.getLogger(__name__)

POLL_S = 1.0
BACKOFF_MAX_S = 3600.0
USER_AGENT = "fraudgate-webhooks"
GONE = 410
HEAD_BYTES_MAX = 16_384


@dataclass(frozen=True)
class Delivering:
    """Bounds of every webhook. `attempts_max` in all, `retry_max_ms` from the first to the last; `first_ms` is the first pause."""

    timeout_s: float
    attempts_max: int
    first_ms: int
    retry_max_ms: int
    concurrency: int


def pause_ms(attempts: int, first_ms: int, jitter: float) -> int:
    """After that many attempts: doubled each time, up to BACKOFF_MAX_S, of which `jitter` in [0, 1) takes up to a half."""
    full = min(BACKOFF_MAX_S * 1000, first_ms * 2.0 ** min(attempts - 1, 40))
    return max(1, round(full * (1 - jitter / 2)))


class Deliverer:
    """Runs on the event loop. `wake` says that there may be something new."""

    def __init__(
        self,
        database: Database,
        queue: WebhookQueue,
        metrics: CaseMetrics,
        bounds: Delivering,
        path: str,
        *,
        now_ms: Callable[[], int],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._queue = queue
        self._metrics = metrics
        self._bounds = bounds
        self._path = path
        self._now_ms = now_ms
        self._jitter = jitter
        self._lanes: dict[str, tuple[Webhook, asyncio.Task[None]]] = {}
        self._events: dict[str, asyncio.Event] = {}
        self._complaint = ""

    def wake(self) -> None:
        """On the event loop."""
        for event in self._events.values():
            event.set()

    async def run(self) -> None:
        """Until cancelled: a lane for each webhook of the file, which is followed."""
        bounds = self._bounds
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, ssl=ssl.create_default_context())
        timeout = aiohttp.ClientTimeout(total=bounds.timeout_s)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            max_line_size=HEAD_BYTES_MAX,
            max_field_size=HEAD_BYTES_MAX,
        ) as session:
            try:
                while True:
                    self._match_lanes(session)
                    await asyncio.sleep(POLL_S)
                    await asyncio.to_thread(self._refresh)
            finally:
                tasks = [task for _, task in self._lanes.values()]
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks)

    def _refresh(self) -> None:
        try:
            self._queue.webhooks = load_webhooks(self._path)
            self._complaint = ""
        except WebhookFileError as exc:
            if str(exc) != self._complaint:
                log.error("webhooks: those of before stay: %s", exc)  # noqa: TRY400
            self._complaint = str(exc)

    def _match_lanes(self, session: aiohttp.ClientSession) -> None:
        wanted = self._queue.webhooks
        for name, (webhook, task) in list(self._lanes.items()):
            if wanted.get(name) != webhook or task.done():
                # What is under way is tried again by the next lane; receivers tell it by its id.
                task.cancel()
                del self._lanes[name], self._events[name]
        for name, webhook in wanted.items():
            if name not in self._lanes:
                self._events[name] = asyncio.Event()
                task = asyncio.create_task(self._lane(session, webhook, self._events[name]))
                task.add_done_callback(_tell_end)
                self._lanes[name] = webhook, task

    async def _lane(self, session: aiohttp.ClientSession, webhook: Webhook, event: asyncio.Event) -> None:
        name, most = webhook.name, self._bounds.concurrency
        self._metrics.expect_webhook(name)
        while True:
            event.clear()
            now_ms = self._now_ms()
            due, next_ms, waiting = await self._database.run(partial(self._look, name=name, now_ms=now_ms, most=most))
            self._metrics.webhook_queue.labels(name).set(waiting)
            if due:
                await asyncio.gather(*(self._attempt(session, webhook, delivery) for delivery in due))
                continue
            pause_s = POLL_S if next_ms is None else min(POLL_S, max(0.001, (next_ms - now_ms) / 1000))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), pause_s)

    def _look(self, connection: sqlite3.Connection, *, name: str, now_ms: int, most: int) -> tuple[list[Delivery], int | None, int]:
        return *self._queue.due(connection, name, now_ms, most), self._queue.waiting(connection, name)

    async def _attempt(self, session: aiohttp.ClientSession, webhook: Webhook, delivery: Delivery) -> None:
        failure, for_good = await self._send(session, webhook, delivery)
        now_ms, bounds = self._now_ms(), self._bounds
        name, seq = webhook.name, delivery.seq
        if failure is None:
            await self._database.run(lambda c: self._queue.delivered(c, seq, now_ms))
            self._metrics.webhook_delivered.labels(name).inc()
            return
        attempts = delivery.attempts + 1
        due_ms: int | None = now_ms + pause_ms(attempts, bounds.first_ms, self._jitter())
        assert due_ms is not None
        if for_good or attempts >= bounds.attempts_max or due_ms > delivery.created_at_ms + bounds.retry_max_ms:
            due_ms = None
            log.warning(
                "webhooks: %s: message %s is a dead letter after %d attempts: %s", name, delivery.message_id, attempts, failure
            )
        await self._database.run(lambda c: self._queue.failed(c, seq, failure, due_ms, now_ms))
        self._metrics.webhook_failed.labels(name).inc()
        if due_ms is None:
            self._metrics.webhook_dead.labels(name).inc()

    async def _send(self, session: aiohttp.ClientSession, webhook: Webhook, delivery: Delivery) -> tuple[str | None, bool]:
        """(why it failed, None when it was taken; whether trying again is of no use)."""
        timestamp_s = self._now_ms() // 1000
        headers = {
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "webhook-id": delivery.message_id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signatures(webhook.keys, delivery.message_id, timestamp_s, delivery.body),
        }
        try:
            async with session.post(webhook.url, data=delivery.body, headers=headers, allow_redirects=False) as reply:
                if 200 <= reply.status < 300:
                    return None, False
                return f"status {reply.status}", reply.status == GONE
        except TimeoutError:
            return f"no answer within {self._bounds.timeout_s:g} s", False
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return f"not reached: {type(exc).__name__}", False


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("webhooks: a lane ended", exc_info=task.exception())
