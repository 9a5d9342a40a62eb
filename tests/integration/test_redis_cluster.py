"""The gateway and the Spark job's tile writer on a real Redis Cluster of three masters."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import redis
from msgspec import structs

from deploy.stack import Stack
from feature_jobs import redis_client
from feature_jobs.redis_wire import ClusterWire
from feature_jobs.tiles import TileJob, merge_events, merge_into_redis
from gateway.contracts import layout
from gateway.contracts.features import ENTITIES, FEATURE_INDEX
from gateway.contracts.redis_address import CLUSTER_SLOTS, hash_slot
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from gateway.redis.cluster import ClusterLink
from gateway.redis.store import Observation, Store
from gateway.scoring.job import Job, requests_of
from tests.entities import EPOCH, Entities, events_of, make_stream
from tests.helpers import running_command, until
from tests.integration.gateway_helpers import Decisions, name, post, ready_without
from tests.integration.gateway_helpers import make_transaction as make_payment
from tests.integration.overtaking import assert_counts_once_and_the_first_answer_stands, assert_observed_afterwards_once
from tests.oracle import Oracle, differences
from tests.redis_nodes import NODES, Cluster, running_cluster
from tests.unit.gateway.factories import NOW_MS, make_job, make_transaction, write_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]
T = TypeVar("T")
BUDGET_S = 10.0
READY_WITHIN_S = 40
COUNT = FEATURE_INDEX["card_count_5m"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> Iterator[redis.RedisCluster]:
    with redis_client.connect(cluster.url) as made:
        assert isinstance(made, redis.RedisCluster)
        yield made


def with_stores(cluster: Cluster, stores: int, use: Callable[..., Awaitable[T]]) -> T:
    """Runs `use` with so many stores, each on a link of its own."""

    async def run() -> T:
        links = [ClusterLink(cluster.url, 5.0) for _ in range(stores)]
        made = [Store(link, 60_000, now_ms=lambda: NOW_MS) for link in links]
        for link in links:
            link.start()
        try:
            await until(lambda: all(link.ready for link in links), 30)
            async with asyncio.timeout(60):
                return await use(*made)
        finally:
            for link in links:
                await link.stop()

    return asyncio.run(run())


async def look(store: Store, *jobs: Job, update: bool = True, timeout_s: float = BUDGET_S) -> Observation | None:
    return await store.observe(jobs, requests_of(jobs), timeout_s, update)


async def observe(store: Store, *jobs: Job, update: bool = True) -> Observation:
    found = await look(store, *jobs, update=update)
    assert found is not None
    return found


class OnCluster(Entities):
    """Both writers on the cluster; the store has a link of its own on `runner`'s loop."""

    def __init__(self, cluster: Cluster, client: redis.RedisCluster, runner: asyncio.Runner) -> None:
        super().__init__(client)  # type: ignore[arg-type]
        self.link = ClusterLink(cluster.url, 5.0)
        self.store = Store(self.link, 600_000, now_ms=lambda: self.now_ms)
        self._runner = runner
        runner.run(self._start())

    async def _start(self) -> None:
        self.link.start()
        await until(lambda: self.link.ready, 30)

    def look(self, batch: Sequence[Transaction], update: bool = True, again: bool = False) -> Observation:
        return self._runner.run(observe(self.store, *[self.job(t, again) for t in batch], update=update))

    def stop(self) -> None:
        self._runner.run(self.link.stop())


@pytest.mark.parametrize(("seed", "step_ms", "rows_max"), [(21, 60_000, 1), (22, 1_800_000, 12), (23, 100_000_000, 12)])
def test_features_equal_a_recount(cluster: Cluster, client: redis.RedisCluster, seed: int, step_ms: int, rows_max: int) -> None:
    rng, oracle = random.Random(seed), Oracle()
    stream = make_stream(seed, 240, step_ms, 30_000)
    pending: list[Transaction] = []
    with asyncio.Runner() as runner:
        entities = OnCluster(cluster, client, runner)
        at = 0
        while at < len(stream):
            batch = stream[at : at + rng.randrange(1, rows_max + 1)]
            at += len(batch)
            what_if = entities.look(batch[:1], update=False).matrix[0].tolist()
            found = entities.look(batch).matrix.tolist()
            for t, row in zip(batch, found, strict=True):
                assert differences(oracle.observe(t), row) == [], t.transaction_id
            assert differences(found[0], what_if) == []
            pending += batch
            # Never more untiled events than a head holds.
            if len(pending) + rows_max > min(e.head_events_max for e in ENTITIES) or rng.random() < 0.2:
                entities.tile(pending)
                pending = []
            if rng.random() < 0.3:
                about = rng.choice(stream[:at])
                entities.label(about, 1)
                oracle.label(about, 1)
        entities.stop()


def test_an_answered_retry_is_settled_and_counts_once(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    job, copy = make_job(make_transaction(run, card_id=run)), make_job(make_transaction(run, card_id=run), offset=3)
    after = make_job(make_transaction(f"{run}-after", card_id=run))

    async def use(store: Store) -> tuple[Observation, Observation, Observation, int]:
        first = await observe(store, job)
        store.record([(job, job.claim + b"answer")])
        retries = await observe(store, job, copy)
        return first, retries, await observe(store, after), store.failed_records

    first, retries, last, failed = with_stores(cluster, 1, use)
    assert first.settled == [None]
    assert retries.settled == [job.claim + b"answer"] * 2
    assert last.seq[0, 0] == first.seq[0, 0] + 1
    assert failed == 0


def test_a_redelivery_keeps_its_place_and_a_retry_through_another_gateway_is_settled(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    jobs = [make_job(make_transaction(f"{run}-{i}", card_id=run), offset=i) for i in range(3)]
    retry = make_job(jobs[0].transaction, offset=9)

    async def use(store: Store, other: Store) -> tuple[Observation, Observation, Observation]:
        first = await observe(store, *jobs)
        # The answer was recorded and the Kafka transaction was not committed.
        store.record([(jobs[1], jobs[1].claim + b"answer")])
        return first, await observe(store, *jobs), await observe(other, retry)

    first, again, settled = with_stores(cluster, 2, use)
    assert np.diff(first.seq[:, 0]).tolist() == [1, 1]
    assert first.seq.tolist() == again.seq.tolist()
    assert np.array_equal(first.matrix, again.matrix, equal_nan=True)
    assert again.settled == [None] * 3
    assert settled.settled == [jobs[0].claim]


def test_who_overtakes_counts_once_and_of_two_answers_the_first_stands(cluster: Cluster) -> None:
    run = secrets.token_hex(4)

    async def use(store: Store, other_store: Store) -> None:
        await assert_counts_once_and_the_first_answer_stands(store, other_store, run)

    with_stores(cluster, 2, use)


def test_what_was_decided_without_redis_is_observed_afterwards_once(cluster: Cluster) -> None:
    run = secrets.token_hex(4)

    async def use(store: Store) -> None:
        await assert_observed_afterwards_once(store, run)

    with_stores(cluster, 1, use)


def test_of_fifty_simultaneous_charges_on_two_gateways_the_kth_sees_k_minus_one(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    jobs = [make_job(make_transaction(f"{run}-{i}", card_id=run, customer_id=run)) for i in range(50)]

    async def use(*stores: Store) -> list[Observation]:
        return await asyncio.gather(*(observe(stores[i % 2], job) for i, job in enumerate(jobs)))

    found = with_stores(cluster, 2, use)
    assert sorted(f.matrix[0, COUNT] for f in found) == list(range(50))
    assert sorted(f.matrix[0, FEATURE_INDEX["customer_count_1h"]] for f in found) == list(range(50))


def card_job(run: str, i: int) -> Job:
    return make_job(make_transaction(f"{run}-{i}", card_id=run, customer_id=f"k-{run}", merchant_id=f"m-{run}"), offset=i)


@pytest.mark.parametrize("tiled", [False, True], ids=["heads alone", "heads and tiles"])
def test_a_slot_is_followed_at_each_step_of_its_migration(cluster: Cluster, client: redis.RedisCluster, tiled: bool) -> None:
    run = secrets.token_hex(4)
    jobs = [card_job(run, i) for i in range(8)]
    slot = hash_slot(layout.head_key("card", run))
    source = cluster.owner(slot)
    target = cluster.other(source)

    async def use(store: Store) -> tuple[list[Observation | None], list[Observation]]:
        await observe(store, *jobs[:2])
        if tiled:
            client.script_load(layout.MERGE_LUA)
            past = events_of([job.transaction for job in jobs[:2]])
            merge_events(ClusterWire(client), TileJob("", EPOCH, 1, NOW_MS, retry_s=0), past)
        cluster.open_slot(slot, source, target)
        during = [await look(store, jobs[2])]
        cluster.move_keys(slot, source, target)
        during.append(await look(store, jobs[3]))
        cluster.close_slot(slot, target)
        # Also what was not observed meanwhile, as Kafka or the caller's retry brings it again.
        return during, [await observe(store, job) for job in (jobs[2], jobs[3], *jobs[4:])]

    during, after = with_stores(cluster, 1, use)
    # A script needs both values of an entity. While one is missing Redis can't tell on which side it would be.
    assert [found is not None for found in during] == [tiled, tiled]
    assert [float(found.matrix[0, COUNT]) for found in after] == [2, 3, 4, 5, 6, 7]
    assert cluster.owner(slot) is target


def test_a_slot_that_wanders_under_traffic_of_two_gateways_loses_nothing(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    slot = hash_slot(layout.head_key("card", run))
    after = 20

    def wander() -> None:
        for i in range(9):
            cluster.move_slot(slot, cluster.nodes[i % 3])

    async def serve(store: Store, first: int, moving: asyncio.Task[None]) -> list[int]:
        """The place of each. What isn't observed comes again, as from Kafka; once the slot rests, nothing is missed any more."""
        places: list[int] = []
        left = after
        while left:
            left -= moving.done()
            found = None
            while found is None:
                rests = moving.done()
                found = await look(store, card_job(run, first + 2 * len(places)), timeout_s=1.0)
                assert found is not None or not rests
            places.append(int(found.seq[0, 0]))
        return places

    async def use(*stores: Store) -> list[int]:
        moving = asyncio.create_task(asyncio.to_thread(wander))
        served = await asyncio.gather(*(serve(store, i, moving) for i, store in enumerate(stores)))
        await moving
        return sorted(place for of_store in served for place in of_store)

    places = with_stores(cluster, 2, use)
    assert len(places) > 2 * after
    assert np.diff(places).tolist() == [1] * (len(places) - 1)


def test_a_silent_node_costs_the_budget_once_and_comes_back(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    budget_s = 0.2
    silent = cluster.owner(hash_slot(layout.head_key("card", run)))

    async def use(store: Store) -> tuple[list[float], int]:
        await observe(store, card_job(run, 0))
        took = []
        with silent.silent():
            for i in (1, 2):
                began = time.monotonic()
                assert await look(store, card_job(run, i), timeout_s=budget_s) is None
                took.append(time.monotonic() - began)
            assert not store.ready
        await until(lambda: store.ready, 30)
        again = [await observe(store, card_job(run, i)) for i in (1, 2)]
        return took, int(again[-1].matrix[0, COUNT])

    (first_s, second_s), count = with_stores(cluster, 1, use)
    assert first_s < budget_s + 1
    assert second_s < budget_s / 2, "a node that is known to be silent is not waited for"
    assert count == 2


@pytest.mark.slow
def test_a_master_that_is_killed_is_replaced_by_its_replica(tmp_path: Path) -> None:
    run = secrets.token_hex(4)
    # Of the first master's slots, whose replica takes over.
    card = next(f"{run}-{i}" for i in range(1000) if hash_slot(layout.head_key("card", f"{run}-{i}")) < CLUSTER_SLOTS // NODES)
    jobs = [make_job(make_transaction(f"{card}-{i}", card_id=card), offset=i) for i in range(3)]
    with running_cluster(tmp_path, replicas=1) as cluster:
        master, replica = cluster.nodes[0], cluster.nodes[-1]

        async def use(store: Store) -> list[Observation]:
            first = await observe(store, jobs[0])
            # Replication is asynchronous: what the replica hasn't got yet would be lost.
            written = master.client.info("replication")["master_repl_offset"]
            await until(lambda: replica.client.info("replication")["slave_repl_offset"] >= written, 10)
            master.process.kill()
            await until(lambda: not store.ready, 10)
            assert await look(store, jobs[1]) is None
            await until(lambda: store.ready, 30)
            return [first, await observe(store, jobs[1]), await observe(store, jobs[2])]

        before = life_of(cluster)
        found = with_stores(cluster, 1, use)
        assert [float(f.matrix[0, COUNT]) for f in found] == [0, 1, 2]
        assert replica.client.info("replication")["role"] == "master"
        assert life_of(cluster) != before


def test_a_password_is_given_to_every_node_by_both_writers(tmp_path: Path) -> None:
    job = make_job()
    with running_cluster(tmp_path, password="p@ss,w/rd:1") as cluster:
        found = with_stores(cluster, 1, lambda store: observe(store, job, make_job(make_transaction("t2"))))
        assert found.matrix[:, COUNT].tolist() == [0, 1]
        [written] = merge_into_redis(TileJob(cluster.url, EPOCH, 1, NOW_MS, retry_s=1))([arrow_of([job.transaction])])
        assert written.to_pydict()["written"] == [3]


def life_of(cluster: Cluster) -> str:
    with redis_client.connect(cluster.url) as client:
        return redis_client.run_id(client)


def test_answers_that_a_silent_node_can_not_store_are_counted(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    jobs = [card_job(run, i) for i in range(30)]

    async def use(store: Store) -> int:
        await observe(store, *jobs)
        with cluster.nodes[0].silent():
            store.record([(job, job.claim + b"answer") for job in jobs])
            await until(lambda: store.failed_records, 10)
            failed = store.failed_records
        await until(lambda: store.ready, 30)
        return failed

    assert with_stores(cluster, 1, use) == len(jobs)


def test_scripts_that_the_nodes_have_forgotten_are_sent_again(cluster: Cluster) -> None:
    run = secrets.token_hex(4)

    async def use(store: Store) -> Observation:
        await observe(store, card_job(run, 0))
        for node in cluster.nodes:
            node.ask("SCRIPT", "FLUSH")
        return await observe(store, *[card_job(run, i) for i in range(1, 20)])

    assert with_stores(cluster, 1, use).matrix[:, COUNT].tolist() == list(range(1, 20))


def arrow_of(batch: Sequence[Transaction]) -> pa.RecordBatch:
    """Events as Spark hands them to a worker."""
    events = events_of(batch)
    columns: dict[str, Any] = {
        "tag": [events.tags[owner] for owner in events.owner],
        "txn": [transaction.tobytes() for transaction in events.transaction],
        "event_time_ms": events.event_time_ms,
        "amount_minor": events.amount_minor,
        **{f"dim_{letter}": dim.astype(np.int64) for letter, dim in zip("abc", events.dims, strict=True)},
        "from_kafka": events.from_kafka,
    }
    return pa.RecordBatch.from_pydict(columns)


def test_a_worker_of_the_jobs_writes_to_every_node_and_once(cluster: Cluster) -> None:
    run = secrets.token_hex(4)
    batch = [card_job(f"{run}-{i}", 0).transaction for i in range(40)]
    write = merge_into_redis(TileJob(cluster.url, EPOCH, 1, NOW_MS, retry_s=5))
    before = [node.client.dbsize() for node in cluster.nodes]
    [first] = write([arrow_of(batch)])
    [replay] = write([arrow_of(batch)])
    assert (first.to_pydict(), replay.to_pydict()) == (
        {"written": [120], "unchanged": [0]},
        {"written": [0], "unchanged": [120]},
    )
    grown = [int(node.client.dbsize()) - int(old) for node, old in zip(cluster.nodes, before, strict=True)]
    assert all(grown)


def test_the_jobs_follow_a_slot_that_moves(cluster: Cluster, client: redis.RedisCluster) -> None:
    run = secrets.token_hex(4)
    job = TileJob("", EPOCH, 1, NOW_MS, retry_s=5)
    client.script_load(layout.MERGE_LUA)
    slot = hash_slot(layout.tiles_key("card", run))
    source = cluster.owner(slot)
    target = cluster.other(source)
    merge_events(ClusterWire(client), job, events_of([card_job(run, 0).transaction]))
    cluster.open_slot(slot, source, target)
    cluster.move_keys(slot, source, target)
    assert redis_client.cluster_pipelined(client, [("GET", layout.tiles_key("card", run))]) != [None]
    cluster.close_slot(slot, target)
    merge_events(ClusterWire(client), dataclasses.replace(job, batch_id=2), events_of([card_job(run, 1).transaction]))
    value = client.get(layout.tiles_key("card", run))
    assert isinstance(value, bytes)
    tiles = layout.unpack_tiles([value], [0], [layout.key_check("card", run)]).tiles
    assert tiles["count"][tiles["resolution_min"] == 5].sum() == 2


def test_one_master_that_lost_its_data_means_that_the_tiles_are_not_whole(cluster: Cluster, client: redis.RedisCluster) -> None:
    progress = layout.Progress(EPOCH, 7, NOW_MS, NOW_MS)
    redis_client.set_progress(client, progress)
    assert redis_client.get_progress(client) == progress
    # The gateway reads the record where it always stands.
    assert client.get(layout.PROGRESS_KEY) is not None
    for node in cluster.nodes:
        node.client.flushall()
        assert redis_client.get_progress(client) is None
        redis_client.set_progress(client, progress)
    redis_client.set_progress(client, structs.replace(progress, batch_id=8))
    client.set(layout.PROGRESS_COPY_KEYS[3], msgspec.msgpack.encode(progress))
    assert redis_client.get_progress(client) == progress


def test_the_life_of_a_cluster_is_that_of_all_its_masters(cluster: Cluster, client: redis.RedisCluster) -> None:
    ids = redis_client.run_id(client).split("+")
    assert sorted(ids) == sorted(str(node.client.info("server")["run_id"]) for node in cluster.nodes)


@pytest.mark.slow
def test_a_served_gateway_scores_with_features_from_the_cluster(
    cluster: Cluster, stack: Stack, settings: Settings, tmp_path: Path
) -> None:
    assert stack.pid("kafka")
    write_model(tmp_path / "models")
    own = dataclasses.replace(
        settings,
        redis_url=cluster.url,
        model_dir=str(tmp_path / "models"),
        feature_budget_ms=1000,
        decision_budget_ms=3000,
        publish_budget_ms=1000,
    )
    card = name("clustered")
    payments = [make_payment(f"{card}-{i}", card_id=card) for i in range(5)]
    with running_command(own, "serve", log_path=tmp_path / "gateway.log") as command:
        command.wait_until(lambda: ready_without(own, "redis", "model", "kafka"), READY_WITHIN_S, "the gateway is ready")
        decisions = Decisions(own)
        answers = [post(own, t) for t in payments]
        again = post(own, payments[0])
        receipts = decisions.of(t.transaction_id for t in payments)
        decisions.close()
        assert command.stop(), "the gateway didn't leave on SIGTERM"
    assert [status for status, _ in answers] == [200] * 5
    assert not any("request_only" in answer["degraded"] for _, answer in answers)
    assert again == answers[0]
    assert [receipts[t.transaction_id].features[COUNT] for t in payments] == [0, 1, 2, 3, 4]
