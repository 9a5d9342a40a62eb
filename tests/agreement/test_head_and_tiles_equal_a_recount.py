"""Head and tiles in a real Redis, through both Lua scripts, against the slow oracle: whenever and in whatever order tiles are
written, each event is counted exactly once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from gateway.contracts import layout
from gateway.contracts.features import ENTITIES, ENTITY_INDEX
from gateway.contracts.transaction import Transaction
from tests.entities import NOON_MS, WALL_MS, Entities, events_of, make_stream, redis_server
from tests.oracle import Oracle, differences

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with redis_server(tmp_path_factory.mktemp("redis")) as client:
        yield client


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(seed=9863, step_ms=20_000_000, disorder_ms=30_000, tile_chance=0.0, wall_ms=WALL_MS)
@example(seed=9863, step_ms=20_000_000, disorder_ms=30_000, tile_chance=0.1, wall_ms=NOON_MS)
@given(
    seed=st.integers(0, 2**32),
    step_ms=st.sampled_from([1_000, 60_000, 1_800_000, 20_000_000, 100_000_000]),
    disorder_ms=st.sampled_from([0, 30_000, 240_000]),
    tile_chance=st.sampled_from([0.0, 0.1, 0.5]),
    # As payments are made, or long afterwards.
    wall_ms=st.sampled_from([NOON_MS, WALL_MS]),
)
def test_each_event_counts_once_whenever_it_is_tiled(
    server: redis.Redis, seed: int, step_ms: int, disorder_ms: int, tile_chance: float, wall_ms: int
) -> None:
    entities, oracle, rng = Entities(server, wall_ms=wall_ms), Oracle(), random.Random(seed + 1)
    pending: list[Transaction] = []
    labelled: dict[str, int] = {}
    past: list[Transaction] = []
    # Never more untiled events than a head holds (that has its own test), but more events than it counts.
    for t in make_stream(seed, 120, step_ms, disorder_ms):
        assert differences(oracle.observe(t), entities.observe(t)) == [], t.transaction_id
        pending.append(t)
        past.append(t)
        full = len(pending) == min(e.head_events_max for e in ENTITIES)
        if full or rng.random() < tile_chance:
            take = len(pending) if full else rng.randrange(len(pending) + 1)
            if take:
                entities.tile(pending[:take])
            del pending[:take]
        if rng.random() < 0.2:
            # A payment turns out to have been fraud, or not after all.
            about = rng.choice(past)
            change = -1 if labelled.get(about.transaction_id, 0) else 1
            labelled[about.transaction_id] = labelled.get(about.transaction_id, 0) + change
            entities.label(about, change)
            oracle.label(about, change)


def test_a_batch_of_many_sees_what_its_rows_would_have_seen_one_by_one(server: redis.Redis) -> None:
    stream = make_stream(11, 200, 1_800_000, 0)
    one_by_one = Entities(server, wall_ms=NOON_MS)
    rows = []
    for n, t in enumerate(stream):
        rows.append(one_by_one.observe(t))
        if n % 40 == 39:
            one_by_one.tile(stream[n - 39 : n + 1])
    together, found = Entities(server, wall_ms=NOON_MS), []
    for first in range(0, len(stream), 40):
        found += together.look(stream[first : first + 40]).matrix.tolist()
        together.tile(stream[first : first + 40])
    for want, got in zip(rows, found, strict=True):
        assert differences(want, got) == []


def test_a_replayed_batch_of_tiles_changes_nothing(server: redis.Redis) -> None:
    entities, stream = Entities(server), make_stream(3, 20, 60_000, 0)
    for t in stream:
        entities.observe(t)
    assert entities.tile(stream) == len(events_of(stream).tags)
    before = values(server)
    assert entities.tile(stream, batch_id=entities.batch_id) == 0
    assert values(server) == before


def test_the_tiles_are_the_same_however_the_events_were_cut_into_batches(server: redis.Redis) -> None:
    stream = make_stream(8, 90, 1_800_000, 0)
    contents = []
    for size in (90, 30, 7):
        entities = Entities(server, hours_a_batch=0)
        for first in range(0, len(stream), size):
            entities.tile(stream[first : first + size])
        contents.append({key: value[48:] for key, value in values(server).items()})
    assert contents[0] == contents[1] == contents[2]


def test_observing_a_transaction_again_returns_what_it_saw_the_first_time(server: redis.Redis) -> None:
    entities, stream = Entities(server), make_stream(5, 12, 60_000, 0)
    first = [entities.observe(t) for t in stream]
    server.delete(layout.idempotency_key(stream[4].transaction_id))
    assert differences(first[4], entities.observe(stream[4], again=True)) == []


@pytest.mark.parametrize("wall_ms", [NOON_MS, WALL_MS])
def test_events_that_leave_a_full_head_before_they_are_tiled_are_counted(server: redis.Redis, wall_ms: int) -> None:
    entities = Entities(server, wall_ms=wall_ms)
    stream = [t for t in make_stream(9, 400, 1_000, 0) if t.device_id == "d0"][:100]
    for t in stream:
        entities.observe(t)
    head = server.get(layout.head_key("device", "d0"))
    assert isinstance(head, bytes)
    lost = layout.HEAD_HEADER.unpack_from(head)[6]
    held = len(layout.head_events(head, ENTITY_INDEX["device"], layout.key_check("device", "d0")))
    assert lost > 0
    assert lost + held == len(stream)
    entities.tile(stream)
    head = server.get(layout.head_key("device", "d0"))
    assert isinstance(head, bytes)
    assert layout.HEAD_HEADER.unpack_from(head)[6] == 0, "once Spark has tiled them, nothing is missing any more"


@pytest.mark.parametrize("wall_ms", [NOON_MS, WALL_MS])
def test_a_burst_over_the_heads_bound_counts_as_many_as_the_definition_says(server: redis.Redis, wall_ms: int) -> None:
    entities, oracle = Entities(server, wall_ms=wall_ms), Oracle()
    burst = [t for t in make_stream(9, 800, 1, 0) if t.card_id == "c0"][:150]
    stream = [structs.replace(t, event_time_ms=NOON_MS + 100 * n) for n, t in enumerate(burst)]
    for n, t in enumerate(stream):
        assert differences(oracle.observe(t), entities.observe(t)) == [], n
        if n % 30 == 29:
            entities.tile(stream[n - 29 : n + 1])


def test_what_was_lost_is_born_anew_behind_the_old_order_of_observation(server: redis.Redis) -> None:
    entities, stream = Entities(server), make_stream(6, 4, 60_000, 0)
    before = [entities.look([t]).seq[0, 0] for t in stream[:2]]
    server.delete(*server.keys(f"{layout.PREFIX}:*"))
    entities.hour += 1
    after = [entities.look([structs.replace(t, card_id=stream[0].card_id)]).seq[0, 0] for t in stream[2:]]
    assert max(before) < min(after)


def values(server: redis.Redis) -> dict[bytes, bytes]:
    """Every packed value of every entity."""
    keys = server.keys(f"{layout.PREFIX}:{{*")
    assert isinstance(keys, list)
    return {key: server.get(key) for key in keys}  # type: ignore[misc]
