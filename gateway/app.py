"""The composition root: settings in, one ASGI application out. The only place that builds the gateway's parts and joins them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from gateway.api_keys import KeyBook
from gateway.audit import AuditForwarder, policy_loaded, policy_refused
from gateway.console.app import PATH as CONSOLE_PATH
from gateway.console.app import Console
from gateway.contracts.features import FINGERPRINT
from gateway.contracts.lists import NO_VERSION, ListBook
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry
from gateway.contracts.routing import Verdict, default_routing
from gateway.contracts.settings import CONSOLE_OFF, EXACTLY_ONCE, Settings
from gateway.explanations.reasons import Reasoner
from gateway.http.admission import AdaptiveLimit
from gateway.http.batcher import Batcher
from gateway.http.connections import Connections, Limits
from gateway.http.door import SCORE_PATH, Receive, Scope, ScoreDoor, Send
from gateway.http.openapi import describe_score
from gateway.kafka.avro import SchemaBook
from gateway.kafka.door import KafkaDoor
from gateway.kafka.link import FETCH_WAIT_MS, Link
from gateway.kafka.publisher import Publisher
from gateway.kafka.records import guard_record
from gateway.kafka.spool import Spool, open_orphan, open_own
from gateway.kafka.watchdog import EXIT_STUCK, GroupProbe, Watchdog, leave_process
from gateway.loop_watch import LoopWatch
from gateway.metrics import Metrics
from gateway.models.explore import Explorer, LossCap
from gateway.models.guard import Guard
from gateway.models.model import Live, Model, ModelSlot
from gateway.models.shadow import ShadowTopic
from gateway.models.slack import Slack
from gateway.policy import Policy
from gateway.policy.lists import ChangeReader, ListFollower
from gateway.policy.slot import expect_counts, open_policy
from gateway.redis.cluster import link_to
from gateway.redis.sharing import STALE_S, SharedCap, asker
from gateway.redis.store import Store
from gateway.redis.unobserved import Unobserved
from gateway.redis.watch import RedisWatch
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.scorer import Scorer
from gateway.tracing.export import open_tracer
from gateway.warm import warm
from gateway.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

CODE_VERSION = version("fraudgate")
DRAIN_S = 10.0
REDIS_WAIT_S = 1.0
REDIS_POLL_S = 0.01
SCHEMAS_RETRY_S = 2.0
# How long a start waits for the topic of list changes, and for all that it holds once it answers.
LISTS_REACH_S, LISTS_WAIT_S = 1.0, 30.0


class Gateway:
    """All parts of one gateway process. It is an ASGI application: /score goes straight to its door, the rest to FastAPI.

    With `consume` it takes part in the consumer group from its start, else when `consume()` says so.

    Raises `PolicyRefusedError` when the policy can't serve, `KeyFileError` for the file of API keys: a gateway doesn't start without them.
    """

    def __init__(self, settings: Settings, *, kafka: bool = True, consume: bool = True) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.policies = open_policy(settings.policy_path, on_change=self._policy_changed, on_refused=self._policy_refused)
        registry = SchemaRegistry(settings.registry, settings.schemas_path)
        self.schemas = SchemaBook(registry)
        self.lists = ListFollower(
            settings.bootstrap, ChangeReader(registry), self.metrics, settings.lists_path, on_book=self._lists_changed
        )
        self.models = ModelSlot(
            settings.models_path,
            on_change=self._model_changed,
            on_refused=self.metrics.model_refused.inc,
            routing=default_routing(settings),
            on_live=self._live_changed,
        )
        claim_ttl_ms = settings.idempotency_window_s * 1000
        # A connection for each door: a chunk from Kafka and a caller's batch don't wait for each other's replies. And one for what was
        # decided without Redis.
        self.links = [link_to(settings.redis, settings.feature_budget_ms / 1000) for _ in range(3)]
        *door_links, spare_link = self.links
        self.unobserved = Unobserved(Store(spare_link, claim_ttl_ms), self.metrics)
        self.redis_watch = RedisWatch(self.links, spare_link, self.metrics)
        ask = asker(spare_link)
        self.guard = Guard(self.models, settings.models_path, self.metrics, alert=self._tell_of_guard, ask=ask)
        self.shadow_topic = ShadowTopic(settings.bootstrap, self.schemas, self.metrics)
        self.slack = Slack(self.metrics, self.shadow_topic.publish, self.guard, idle=lambda: self.batcher.in_flight == 0)
        cap = LossCap(time.monotonic, STALE_S)
        self.shared_cap = SharedCap(cap, self.models, ask, self.metrics)
        self.explorer = Explorer(cap, self.metrics, lambda: time.time_ns() // 1_000_000)
        self.tracer = open_tracer(settings, self.metrics, CODE_VERSION)
        # Both doors know what either decided lately.
        recent = RecentDecisions(settings.idempotency_window_s)
        self.reasoner = Reasoner(self.metrics)
        self.scorers = [
            Scorer(
                Store(link, claim_ttl_ms),
                self.models,
                self.policies,
                self.metrics,
                recent,
                self.unobserved,
                feature_budget_ms=settings.feature_budget_ms,
                code_version=CODE_VERSION,
                reasoner=self.reasoner,
                explorer=self.explorer,
                slack=self.slack,
                tracer=self.tracer,
            )
            for link in door_links
        ]
        http_scorer, kafka_scorer = self.scorers
        kafka_scorer.deciding = http_scorer.deciding
        self.publisher = Publisher(
            settings.bootstrap,
            self.schemas,
            self.metrics,
            settings.publish_buffer_max,
            self._open_spool if settings.spool_mb_max else None,
            self._open_orphan,
            linger_s=settings.publish_linger_ms / 1000,
            sync_s=settings.spool_sync_ms / 1000,
        )
        budget_s = settings.decision_budget_ms / 1000
        self.loop_watch = LoopWatch(self.metrics, idle=lambda: self.batcher.in_flight == 0)
        self.batcher = Batcher(
            http_scorer,
            self.publisher,
            self.metrics,
            batch_rows_max=settings.batch_rows_max,
            limit=AdaptiveLimit(settings.in_flight_max, budget_s),
            loop_lag_s=lambda: self.loop_watch.lag_s,
            publish_budget_s=settings.publish_budget_ms / 1000,
            batch_interval_s=settings.batch_interval_ms / 1000,
            tracer=self.tracer,
        )
        self.keys = KeyBook(Path(settings.api_keys_path).expanduser()) if settings.api_keys_path else None
        self.audit_forwarder = AuditForwarder(settings.models_path, settings.audit_cursor_path, self.publisher.send)
        self.door = ScoreDoor(self.batcher, self.metrics, settings.decision_budget_ms, keys=self.keys)
        self.connections = Connections(
            Limits(settings.connections_max, settings.request_timeout_ms / 1000, settings.keep_alive_s), self.metrics
        )
        self.kafka = None
        if kafka:
            self.kafka = KafkaDoor(
                kafka_scorer,
                self.schemas,
                self.metrics,
                self._make_link,
                batch_rows_max=settings.batch_rows_max,
                chunk_interval_s=settings.kafka_chunk_interval_ms / 1000,
                tracer=self.tracer,
            )
        self.watchdog: Watchdog | None = None
        # What the process is to end with: not 0 when it can't go on.
        self.exit_status = 0
        self.ready = False
        self._consumes = consume
        # Set when there are other workers to add up with.
        self.worker_metrics: WorkerMetrics | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._note_build()
        # Asked for when somebody reads the metrics.
        self.metrics.kafka_connected.set_function(lambda: self.kafka is None or not self._consumes or self.kafka.connected)
        self.metrics.model_serving.set_function(lambda: self.models.model is not None)
        self.metrics.policy_refused.set_function(lambda: self.policies.refused is not None)
        self.console: Console | None = None
        if settings.console_access != CONSOLE_OFF:
            self.console = Console(
                settings,
                self.metrics,
                self.keys,
                kafka=kafka,
                accounts=lambda: (_status(self), _routing_status(self)),
                texts=lambda: {rule.id: rule.text for rule in self.policies.policy.rules},
            )
            for scorer in self.scorers:
                scorer.tap = self.console.tap
        self.api = _make_api(self)

    def _open_spool(self) -> Spool:
        settings = self.settings
        return open_own(settings.spool_root, settings.instance_id, settings.spool_mb_max * 2**20)

    def _open_orphan(self) -> Spool | None:
        return open_orphan(self.settings.spool_root, self.settings.spool_mb_max * 2**20)

    def _make_link(self) -> Link:
        settings = self.settings
        return Link(
            settings.bootstrap,
            settings.consumer_group,
            settings.instance_id,
            self.schemas,
            exactly_once=settings.kafka_delivery == EXACTLY_ONCE,
            # Nothing is asked for more often than chunks begin.
            fetch_wait_ms=max(FETCH_WAIT_MS, settings.kafka_chunk_interval_ms // 2),
        )

    def _watch(self, kafka: KafkaDoor) -> None:
        settings = self.settings
        if settings.kafka_watchdog_s:
            probe = GroupProbe(settings.bootstrap, settings.consumer_group)
            self.watchdog = Watchdog(
                probe,
                settings.kafka_watchdog_s,
                ours=kafka.partitions,
                restart=kafka.restart_session,
                leave=self._leave,
                note=self.metrics.standstill_s.set,
            )
            self.watchdog.start()

    def _leave(self) -> None:
        self.exit_status = EXIT_STUCK
        leave_process()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == SCORE_PATH:
            await self.door(scope, receive, send)
        else:
            await self.api(scope, receive, send)

    async def start(self) -> None:
        """Ready when this returns, at worst degraded: nothing here waits long for a component that is down."""
        for link in self.links:
            link.start()
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.lists.start)
        await self.models.refresh()
        await asyncio.to_thread(warm)
        await self._wait_for_redis()
        await asyncio.to_thread(self.lists.wait, LISTS_REACH_S, LISTS_WAIT_S)
        self.publisher.start()
        self.publisher.send([policy_loaded(self.policies.policy, None)])
        self.slack.start()
        if self.tracer is not None:
            self.tracer.start()
        forever = (
            self.models.watch(),
            self.policies.watch(),
            self.audit_forwarder.run(),
            self.unobserved.run(),
            self.connections.watch(),
            self.loop_watch.run(),
            self.guard.run(),
            self.shared_cap.run(),
            self.redis_watch.run(),
            self._know_schemas(),
        )
        self._tasks = [asyncio.create_task(work) for work in forever]
        if self.keys is not None:
            self._tasks.append(asyncio.create_task(self.keys.watch()))
        if self._consumes:
            self.consume()
        if self.worker_metrics is not None:
            await self.worker_metrics.start()
        if self.console is not None:
            self.console.start(self.worker_metrics)
        self.metrics.workers.set(1)
        self.ready = True
        log.info("gateway: ready on port %d; degraded: %s", self.settings.gateway_port, ", ".join(self.degraded()) or "nothing")

    def consume(self) -> None:
        """Join the consumer group. Nothing happens in a gateway that is in it, or has no Kafka door."""
        self._consumes = True
        if self.kafka is not None and not self.kafka.running:
            self.kafka.start()
            self._watch(self.kafka)

    async def stop_consuming(self) -> None:
        """Finish and commit the chunk under way and leave the consumer group. `consume` joins it again."""
        self._consumes = False
        if self.watchdog is not None:
            self.watchdog.stop()
        if self.kafka is not None:
            await self.kafka.stop(DRAIN_S)

    def leave(self) -> None:
        """No longer ready; each answer from now on is the last of its connection."""
        self.ready = False
        self.connections.leave()
        if self.console is not None:
            self.console.leave()

    async def _wait_for_redis(self) -> None:
        """Give the first connection a moment, so that a gateway started beside a healthy Redis is never degraded."""
        for _ in range(round(REDIS_WAIT_S / REDIS_POLL_S)):
            if all(link.ready for link in self.links):
                return
            await asyncio.sleep(REDIS_POLL_S)

    async def stop(self) -> None:
        """Take nothing new, finish and commit what is under way, deliver what is buffered, leave."""
        self.ready = False
        if self.console is not None:
            await self.console.stop()
        await self.batcher.drain(DRAIN_S)
        await self.stop_consuming()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self.lists.stop)
        await asyncio.to_thread(self.slack.stop)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.stop)
        await asyncio.to_thread(self.shadow_topic.close)
        await self.publisher.stop(DRAIN_S)
        for link in self.links:
            await link.stop()
        self.reasoner.stop()
        if self.worker_metrics is not None:
            await self.worker_metrics.stop()
        log.info("gateway: stopped")

    def degraded(self) -> list[str]:
        """What this gateway does without right now."""
        missing = []
        if not self.links[0].ready:
            missing.append("redis")
        if self.models.model is None:
            missing.append("model")
        if self.policies.live.lists.version == NO_VERSION or self.lists.trouble is not None:
            missing.append("lists")
        if self.kafka is not None and not self.kafka.connected:
            missing.append("kafka")
        return missing

    async def _know_schemas(self) -> None:
        """Learn the schemas' ids early: who publishes for nobody to wait can't wait for them either."""
        while not self.schemas.complete:
            try:
                await self.schemas.resolve()
            except RegistryUnavailableError:
                await asyncio.sleep(SCHEMAS_RETRY_S)
        log.info("gateway: knows its schemas")

    def _policy_changed(self, policy: Policy, before: Policy) -> None:
        self.metrics.policy_loads.labels("used").inc()
        self._note_build()
        self.publisher.send([policy_loaded(policy, before.digest)])

    def _policy_refused(self, why: str) -> None:
        self.metrics.policy_loads.labels("refused").inc()
        self.publisher.send([policy_refused(self.settings.policy_path, self.policies.policy.digest, why)])

    def _note_build(self) -> None:
        self.metrics.build_info.clear()
        self.metrics.build_info.labels(CODE_VERSION, FINGERPRINT, self.policies.policy.digest).set(1)
        expect_counts(self.policies.policy, self.metrics)

    def _lists_changed(self, book: ListBook) -> None:
        """In the thread that follows the lists."""
        with contextlib.suppress(RuntimeError):
            # The loop of a process that is ending takes no more.
            self._loop.call_soon_threadsafe(self.policies.use_lists, book)

    def _live_changed(self, live: Live) -> None:
        self.metrics.challenger_share.set(live.share)

    def _tell_of_guard(self, verdict: Verdict) -> None:
        self.publisher.send([guard_record(verdict)])

    def _model_changed(self, model: Model | None) -> None:
        self.metrics.model_info.clear()
        if model is not None:
            self.metrics.model_info.labels(model.ref.name, model.ref.version, model.digest).set(1)


def _make_api(gateway: Gateway) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    api = FastAPI(title="Fraudgate", version=CODE_VERSION, lifespan=lifespan, description="Fraud decisions on card transactions.")

    @api.get("/healthz", summary="Alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/readyz", summary="Ready to score, and what it does without", responses={503: {"description": "not ready"}})
    async def readyz(response: Response) -> dict[str, Any]:
        if not gateway.ready:
            response.status_code = 503
        return _status(gateway)

    @api.get("/routing", summary="Which models share the traffic, how, and what may be explored")
    async def routing() -> dict[str, Any]:
        return _routing_status(gateway)

    @api.get("/metrics", summary="Metrics in Prometheus' exposition format", response_class=Response)
    async def metrics() -> Response:
        own = gateway.worker_metrics
        text = gateway.metrics.text() if own is None else await own.text()
        return Response(text, media_type="text/plain; version=0.0.4")

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
            describe_score(schema)
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    if gateway.console is not None:
        api.mount(CONSOLE_PATH, gateway.console.app)
    return api


def _status(gateway: Gateway) -> dict[str, Any]:
    model = gateway.models.model
    return {
        "ready": gateway.ready,
        "degraded": gateway.degraded(),
        "consuming": gateway.kafka is not None and gateway.kafka.running,
        "model": None if model is None else {"name": model.ref.name, "version": model.ref.version, "digest": model.digest},
        "model_refused": gateway.models.refused,
        "policy": {"name": gateway.policies.policy.name, "digest": gateway.policies.policy.digest},
        "policy_refused": gateway.policies.refused,
        "lists": _lists_status(gateway),
        "feature_fingerprint": FINGERPRINT,
        "code_version": CODE_VERSION,
    }


def _lists_status(gateway: Gateway) -> dict[str, Any]:
    book = gateway.policies.live.lists
    return {"version": book.version, "digest": book.digest, "entries": book.entries, "trouble": gateway.lists.trouble}


def _routing_status(gateway: Gateway) -> dict[str, Any]:
    live = gateway.models.live

    def told(model: Model | None) -> dict[str, str] | None:
        return None if model is None else {"name": model.ref.name, "version": model.ref.version, "digest": model.digest}

    return {
        "champion": told(live.champion),
        "challenger": told(live.standby),
        "shadows": {m.ref.route: told(m) for m in live.shadows},
        "routed_by": live.routed_by.value,
        "challenger_share": live.share,
        "routing": msgspec.to_builtins(live.routing),
        "explored_today_minor": gateway.explorer.cap.spent_minor,
    }
