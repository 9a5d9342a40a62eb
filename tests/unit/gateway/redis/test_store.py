import math
from collections.abc import Sequence
from typing import Any

import hiredis
import numpy as np
import pytest

from gateway.contracts.features import ENTITIES, FEATURE_INDEX
from gateway.contracts.layout import (
    BASE_STEP,
    DAY_TILE,
    EARLY_MAX,
    ENTITY_RECORD,
    FRAUD_HOUR,
    HEAD_EVENT_PACK,
    HEAD_HEADER,
    HEAD_TTL_MS,
    LAYOUT_VERSION,
    PROGRESS_KEY,
    SEQ_NEXT,
    TILES_HEADER_FIELDS,
    dim_hash,
    head_key,
    idempotency_key,
    key_check,
    labels_key,
    pack_frauds,
    tiles_key,
    txn_hash,
)
from gateway.contracts.windows import DAY_MS, HOUR_MS, LABEL_DELAY_MS, LAST_MS_MAX, SETTLE_MS
from gateway.redis.link import RedisReplyError, RedisUnavailableError
from gateway.redis.store import TILES_AHEAD_MARGIN_MS, Observation, Store, request_only_matrix
from gateway.scoring.job import Job, requests_of
from tests.unit.gateway.factories import NOW_MS, ScriptedLink, make_job, make_transaction, packed_progress

pytestmark = pytest.mark.anyio
BASE = 1_795_400_000_000_000


def head_of(entity: int, name: str, entity_id: str, *events: bytes, lost: int = 0, version: int = LAYOUT_VERSION) -> bytes:
    header = HEAD_HEADER.pack(version, entity, int(ENTITIES[entity].labelled), key_check(name, entity_id), BASE, 0, lost)
    return header + b"".join(events)


def event(seq: int, when_ms: int, amount: int = 100, merchant: str = "m0", transaction: int | None = None) -> bytes:
    dims = (dim_hash(merchant), dim_hash("DE"), dim_hash(None))
    hash_ = 1000 + seq if transaction is None else transaction
    return HEAD_EVENT_PACK.pack(hash_, when_ms, amount, seq, 0, 0, 0, math.nan, math.nan, *dims)


def own_event(transaction_id: str = "t1", seq: int = SEQ_NEXT) -> bytes:
    """The event of the transaction itself, as the script has appended it."""
    return event(seq, NOW_MS, transaction=txn_hash(transaction_id))


def reply_of(*heads: bytes, before: bytes | None = None, progress: bytes | None = None) -> tuple[list[Any], list[Any]]:
    """The replies of script and MGET for one transaction with card, customer and merchant, whose heads are given."""
    held = [heads[i] if i < len(heads) else None for i in range(3)]
    # progress, tiles of each, frauds of customer and merchant, heads
    return [before], [progress, *[None] * 5, *held]


def commands_of(sent: bytes) -> list[list[bytes]]:
    """The commands in bytes as they go over the wire."""
    reader = hiredis.Reader()
    reader.feed(sent)
    commands = []
    while (command := reader.gets()) is not False:
        commands.append(command)
    return commands


def sent_commands(link: ScriptedLink) -> list[list[bytes]]:
    return commands_of(link.sent[-1][0])


def make_store(link: ScriptedLink, now_ms: int = NOW_MS) -> Store:
    return Store(link, 600_000, now_ms=lambda: now_ms)  # type: ignore[arg-type]


async def observe(store: Store, *jobs: Job, update: bool = True) -> Observation | None:
    return await store.observe(jobs, requests_of(jobs), 1.0, update)


async def observed(store: Store, *jobs: Job) -> Observation:
    found = await observe(store, *jobs)
    assert found is not None
    return found


def feature(found: Observation, name: str, row: int = 0) -> float:
    return float(found.matrix[row, FEATURE_INDEX[name]])


FRESH = packed_progress()


async def test_events_of_the_head_become_features() -> None:
    later = event(SEQ_NEXT, NOW_MS, 999)
    head = head_of(
        0, "card", "card-1", event(0, NOW_MS - 60_000, 200), event(SEQ_NEXT, NOW_MS - 1000, 100, "m1"), own_event(), later
    )
    found = await observed(make_store(ScriptedLink(reply_of(head, progress=FRESH))), make_job())
    assert feature(found, "card_count_5m") == 2
    assert feature(found, "card_amount_sum_1h") == 300
    assert feature(found, "card_distinct_merchants_1h") == 2
    assert feature(found, "card_since_last") == 1
    assert feature(found, "merchant_count_5m") == 0
    assert math.isnan(feature(found, "device_count_5m"))
    # What is born now is numbered from the wall clock.
    born = NOW_MS * 1000 // BASE_STEP * BASE_STEP
    assert found.seq.tolist() == [[BASE + 2, born, born, -1, -1]]
    assert found.label_changes.tolist() == [[0, 0]]
    assert not found.stale.any()
    assert found.tiles_age_ms == 0


@pytest.mark.parametrize(
    "head",
    [
        head_of(0, "card", "card-2", event(0, NOW_MS - 1000)),
        head_of(1, "card", "card-1", event(0, NOW_MS - 1000)),
        head_of(0, "card", "card-1", event(0, NOW_MS - 1000), version=LAYOUT_VERSION - 1),
        head_of(0, "card", "card-1", event(0, NOW_MS - 1000), version=9),
        head_of(0, "card", "card-1", event(0, NOW_MS - 1000))[:-1],
        head_of(0, "card", "card-1", event(SEQ_NEXT, NOW_MS - 1000)),
        head_of(0, "card", "card-1"),
        b"short",
    ],
    ids=[
        "another key",
        "another entity",
        "the layout before",
        "another version",
        "a broken record",
        "no place",
        "no event",
        "no header",
    ],
)
async def test_a_value_that_is_not_the_keys_own_is_never_used(head: bytes) -> None:
    store = make_store(ScriptedLink(reply_of(head, progress=FRESH)))
    found = await observed(store, make_job())
    assert math.isnan(feature(found, "card_count_5m"))
    assert feature(found, "customer_count_1h") == 0
    assert found.stale.tolist() == [True]
    assert found.seq[0, 0] == -1
    assert store.refused_values == 1


async def test_a_refused_entitys_head_is_looked_at_when_it_comes_again() -> None:
    link = ScriptedLink(reply_of(head_of(0, "card", "card-2", event(0, NOW_MS)), progress=FRESH), progress=FRESH)
    store = make_store(link)
    looks = []
    for _ in range(2):
        await observed(store, make_job())
        looks.append(np.frombuffer(sent_commands(link)[1][-1], ENTITY_RECORD)["look"].tolist())
    assert looks == [[0, 0, 0], [1, 0, 0]]


async def test_a_head_that_is_sound_again_is_no_longer_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.redis.store.SUSPECTS_MAX", 1)
    damaged = reply_of(head_of(0, "card", "card-2", event(0, NOW_MS)), progress=FRESH)
    sound = reply_of(head_of(0, "card", "card-1", event(0, NOW_MS), own_event()), progress=FRESH)
    link = ScriptedLink(damaged, progress=FRESH)
    store = make_store(link)
    looks = []
    for reply in (damaged, sound, damaged, damaged):
        link.reply = reply
        await observed(store, make_job())
        looks.append(np.frombuffer(sent_commands(link)[1][-1], ENTITY_RECORD)["look"].tolist())
    # There is room for one, and the one that was mended has left it.
    assert looks == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("arrived_ms", "event_ms", "look"), [(0, 0, 0), (-300_001, 0, 1), (0, -300_001, 1), (-300_000, -300_000, 0)]
)
async def test_what_may_have_outlived_its_claim_is_looked_for(arrived_ms: int, event_ms: int, look: int) -> None:
    link = ScriptedLink(reply_of(progress=FRESH), progress=FRESH)
    job = make_job(make_transaction(event_time_ms=NOW_MS + event_ms))
    job.arrived_ms = NOW_MS + arrived_ms
    await observed(make_store(link), job)
    assert np.frombuffer(sent_commands(link)[1][-1], ENTITY_RECORD)["look"].tolist() == [look] * 3


async def test_features_are_stale_until_a_redis_that_lost_data_is_whole_again() -> None:
    lost = packed_progress(lost_at_ms=NOW_MS - 1)
    found = await observed(make_store(ScriptedLink(reply_of(progress=lost))), make_job())
    assert found.stale.tolist() == [True]


async def test_frauds_of_a_merchant_become_its_rate() -> None:
    merchant = key_check("merchant", "merchant-1")
    day = (NOW_MS - LABEL_DELAY_MS) // DAY_MS - 1
    header = np.zeros(1, TILES_HEADER_FIELDS)
    header["version"], header["entity"], header["check"], header["days"] = LAYOUT_VERSION, 2, merchant, 2
    tiles = header.tobytes() + np.array([(day, 4, 1, 1, 1), (day + 1, 9, 1, 1, 1)], DAY_TILE).tobytes()
    # Two hours of the day before the delay ends, and the hour in which it ends, which is not over yet.
    hours = [(day * 24 + 3, 2), (day * 24 + 20, 1), ((NOW_MS - LABEL_DELAY_MS) // HOUR_MS, 5)]
    frauds = pack_frauds(2, merchant, 1, 1, 7, np.array(hours, FRAUD_HOUR))
    reply = reply_of(progress=FRESH)
    reply[1][3], reply[1][5] = tiles, frauds
    found = await observed(make_store(ScriptedLink(reply)), make_job())
    # Of the payments of both days: those of the second are known to have been made, if not what they were.
    assert feature(found, "merchant_fraud_rate_1d") == pytest.approx(3 / 13)
    assert feature(found, "merchant_frauds_30d") == 3
    assert feature(found, "merchant_fraud_rate_since_first") == pytest.approx(3 / 13)
    assert feature(found, "merchant_since_first_fraud") == (NOW_MS - hours[0][0] * HOUR_MS) / 1000
    assert feature(found, "merchant_since_last_fraud") == (NOW_MS - hours[1][0] * HOUR_MS) / 1000
    assert found.label_changes.tolist() == [[0, 7]]
    # One of the first day's four was genuine, so there is no run, and no whole day has come after.
    assert feature(found, "merchant_fraud_run") == 0
    assert math.isnan(feature(found, "merchant_since_fraud_run"))
    assert feature(found, "merchant_since_genuine") == (NOW_MS - day * DAY_MS) / 1000
    assert feature(found, "merchant_payments_after_fraud") == 0


@pytest.mark.parametrize(
    ("frauds_by_day", "run", "first_day", "genuine_day", "after"),
    [
        # Days before the one in which the delay ends, and how many of the day's two payments were fraud.
        ({4: 0, 3: 2, 1: 2, 0: 1}, 5, 3, 4, 0),  # not stopped by the day without payments
        ({4: 1, 3: 2, 2: 0, 1: 0}, 0, None, 1, 4),  # it ended
        ({4: 1, 3: 1, 2: 2, 1: 1}, 0, None, 1, 0),  # the newest whole day had a genuine one
        ({3: 2, 1: 2}, 4, 3, None, 0),  # nothing genuine is known
        ({2: 0, 0: 1}, 1, 0, 2, 0),  # it began on the day in which the delay ends
    ],
)
async def test_frauds_since_a_merchants_last_genuine_payment_are_a_run(
    frauds_by_day: dict[int, int], run: int, first_day: int | None, genuine_day: int | None, after: int
) -> None:
    merchant, end_day = key_check("merchant", "merchant-1"), (NOW_MS - LABEL_DELAY_MS) // DAY_MS
    header = np.zeros(1, TILES_HEADER_FIELDS)
    header["version"], header["entity"], header["check"], header["days"] = LAYOUT_VERSION, 2, merchant, len(frauds_by_day)
    tiles = header.tobytes() + np.array([(end_day - back, 2, 1, 1, 1) for back in frauds_by_day], DAY_TILE).tobytes()
    hours = [((end_day - back) * 24, n) for back, n in frauds_by_day.items() if n]
    reply = reply_of(progress=FRESH)
    reply[1][3], reply[1][5] = tiles, pack_frauds(2, merchant, 1, 1, 7, np.array(hours, FRAUD_HOUR))
    found = await observed(make_store(ScriptedLink(reply)), make_job())

    def since(days_back: int | None) -> float:
        return math.nan if days_back is None else float(np.float32((NOW_MS - (end_day - days_back) * DAY_MS) / 1000))

    assert feature(found, "merchant_fraud_run") == run
    assert feature(found, "merchant_since_fraud_run") == pytest.approx(since(first_day), nan_ok=True)
    assert feature(found, "merchant_since_genuine") == pytest.approx(since(genuine_day), nan_ok=True)
    assert feature(found, "merchant_payments_after_fraud") == after


async def test_a_head_that_may_soon_expire_is_renewed_when_a_payment_is_appended() -> None:
    long_ago = event(0, NOW_MS - LAST_MS_MAX - 1)
    heads = (
        head_of(0, "card", "card-1", long_ago, own_event()),
        head_of(1, "customer", "customer-1", event(0, NOW_MS), own_event()),
    )
    link = ScriptedLink(reply_of(*heads, progress=FRESH), progress=FRESH)
    await observed(make_store(link), make_job())
    assert link.sent[-1] == (("PEXPIRE", head_key("card", "card-1"), HEAD_TTL_MS),)
    await observe(make_store(link), make_job(), update=False)
    assert [command[0] for command in sent_commands(link)] == [b"MGET"]


async def test_evicted_events_make_the_features_stale() -> None:
    head = head_of(0, "card", "card-1", event(0, NOW_MS - 1000), lost=1)
    found = await observed(make_store(ScriptedLink(reply_of(head, progress=FRESH))), make_job())
    assert found.stale.tolist() == [True]


async def test_features_are_stale_without_progress_of_the_spark_job() -> None:
    found = await observed(make_store(ScriptedLink(reply_of())), make_job())
    assert found.stale.tolist() == [True]
    assert found.tiles_age_ms is None


async def test_features_get_stale_when_the_spark_job_leaves_transactions_uncounted() -> None:
    now_ms = NOW_MS
    link = ScriptedLink(reply_of(progress=packed_progress(written_at_ms=NOW_MS - 10 * SETTLE_MS)))
    store = Store(link, 600_000, now_ms=lambda: now_ms)  # type: ignore[arg-type]
    # After a quiet time there was nothing to count.
    assert not (await observed(store, make_job())).stale.any()
    now_ms += SETTLE_MS
    assert not (await observed(store, make_job())).stale.any()
    now_ms += 1
    assert (await observed(store, make_job())).stale.all()


async def test_tiles_ahead_of_what_was_observed_are_stale() -> None:
    header = np.zeros(1, TILES_HEADER_FIELDS)
    header["version"], header["check"], header["early"] = LAYOUT_VERSION, key_check("card", "card-1"), 1
    reply = reply_of(progress=FRESH)
    reply[1][1] = header.tobytes()
    assert (await observed(make_store(ScriptedLink(reply)), make_job())).stale.tolist() == [True]


async def test_the_script_is_told_what_spark_has_counted_already() -> None:
    ahead = packed_progress(arrived_through_ms=NOW_MS + TILES_AHEAD_MARGIN_MS + 1)
    link = ScriptedLink(reply_of(progress=ahead), progress=ahead)
    await observed(make_store(link), make_job(offset=5))
    _, script, _, _ = sent_commands(link)
    records = np.frombuffer(script[-1], ENTITY_RECORD)
    assert records["counted"].tolist() == [1, 1, 1]


async def test_redis_is_asked_for_the_values_of_the_batchs_entities_in_one_transaction() -> None:
    link = ScriptedLink(reply_of(progress=FRESH), progress=FRESH)
    job = make_job()
    await observed(make_store(link), job)
    multi, script, mget, execute = sent_commands(link)
    assert (multi, execute) == ([b"MULTI"], [b"EXEC"])
    heads = [head_key("card", "card-1"), head_key("customer", "customer-1"), head_key("merchant", "merchant-1")]
    keys = [idempotency_key("t1"), *heads]
    assert script[2:7] == [b"4", *(key.encode() for key in keys)]
    capacities = np.array([e.head_events_max for e in ENTITIES], "<u2").tobytes()
    assert script[7:12] == [b"600000", str(HEAD_TTL_MS).encode(), str(EARLY_MAX).encode(), capacities, b"0"]
    assert script[12] == job.claim
    assert len(script) == 14
    tiles = [tiles_key("card", "card-1"), tiles_key("customer", "customer-1"), tiles_key("merchant", "merchant-1")]
    frauds = [labels_key("customer", "customer-1"), labels_key("merchant", "merchant-1")]
    assert mget == [b"MGET", *(key.encode() for key in [PROGRESS_KEY, *tiles, *frauds, *heads])]


async def test_the_record_of_an_entity_is_what_the_layout_says() -> None:
    link = ScriptedLink(reply_of(progress=FRESH), progress=FRESH)
    t = make_transaction("t9", amount_minor=77, latitude=52.5, longitude=13.25)
    await observed(make_store(link), make_job(t))
    _, script, _, _ = sent_commands(link)
    records = [script[-1][i : i + ENTITY_RECORD.itemsize] for i in range(0, len(script[-1]), ENTITY_RECORD.itemsize)]
    base_us = NOW_MS * 1000 // BASE_STEP * BASE_STEP
    for e, record in enumerate(records):
        entity = ENTITIES[e]
        own = getattr(t, entity.field)
        header = HEAD_HEADER.pack(LAYOUT_VERSION, e, int(entity.labelled), key_check(entity.name, own), base_us, 0, 0)
        dims = [dim_hash(getattr(t, name)) for name in entity.dims]
        said = (txn_hash("t9"), t.event_time_ms, 77, SEQ_NEXT, NOW_MS // 1000 % 65_536, 0, 0, 52.5, 13.25, *dims)
        assert record == header + HEAD_EVENT_PACK.pack(*said), entity.name


async def test_a_settled_transaction_has_no_features_and_its_neighbour_has() -> None:
    first, second = make_job(make_transaction("a")), make_job(make_transaction("b"))
    before = first.claim + b"answer"
    head = head_of(0, "card", "card-1", event(0, NOW_MS - 1000), own_event("b"))
    _, values = reply_of(head, progress=FRESH)
    reply = ([before, None], values[:1] + values[1:4] * 2 + values[4:6] * 2 + values[6:] * 2)
    found = await observed(make_store(ScriptedLink(reply)), first, second)
    assert found.settled == [before, None]
    assert math.isnan(feature(found, "card_count_5m", 0))
    assert feature(found, "card_count_5m", 1) == 1
    assert found.seq[0].tolist() == [-1] * len(ENTITIES)


@pytest.mark.parametrize("error", [RedisUnavailableError("gone"), RedisReplyError("OOM")])
async def test_trouble_with_redis_is_no_observation(error: Exception) -> None:
    assert await observe(make_store(ScriptedLink(error)), make_job()) is None


async def test_a_script_that_redis_has_forgotten_is_loaded_again() -> None:
    class Forgetful(ScriptedLink):
        async def call(self, command: Sequence[Any], timeout_s: float) -> Any:
            if command[:2] == ("SCRIPT", "LOAD"):
                self.reply = reply_of(progress=FRESH)
                return b"sha"
            return await super().call(command, timeout_s)

    link = Forgetful((RedisReplyError("NOSCRIPT No matching script."), []))
    found = await observed(make_store(link), make_job())
    assert found.settled == [None]


async def test_a_what_if_read_is_no_more_than_a_read() -> None:
    link = ScriptedLink(reply_of(head_of(0, "card", "card-1", event(0, NOW_MS - 1000)), progress=FRESH), progress=FRESH)
    found = await observe(make_store(link), make_job(), update=False)
    [mget] = sent_commands(link)
    assert mget[0] == b"MGET"
    assert found is not None
    assert feature(found, "card_count_5m") == 1
    assert found.seq[0, 0] == BASE + 1


async def test_answers_that_can_not_be_stored_are_counted() -> None:
    link = ScriptedLink(reply_of())
    store = make_store(link)
    job = make_job()
    store.record([(job, job.claim + b"answer")])
    [command] = commands_of(link.sent[-1][0])
    assert command == [b"SET", idempotency_key("t1").encode(), job.claim + b"answer", b"PX", b"600000"]
    assert store.failed_records == 0
    link.ready = False
    store.record([(make_job(), b"answer")])
    assert store.failed_records == 1


def test_the_request_alone_gives_its_own_features_and_nan() -> None:
    matrix = request_only_matrix(requests_of([make_job(make_transaction(amount_minor=77))]))
    assert matrix[0, FEATURE_INDEX["amount_minor"]] == 77
    assert np.isnan(matrix[0, FEATURE_INDEX["card_count_5m"]])
