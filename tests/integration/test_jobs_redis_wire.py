"""The bulk connection of the tile writers on a real Redis: several groups under way, errors, and connections that break midway."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from deploy.stack import Stack
from feature_jobs import tiles
from feature_jobs.redis_wire import Wire
from feature_jobs.tiles import GROUPS_MAX, RedisUnavailableError, TileJob, merge_into_redis
from gateway.contracts import layout
from gateway.contracts.features import ENTITIES
from gateway.contracts.settings import Settings

pytestmark = pytest.mark.integration

NOW_MS = 1_700_000_000_000
CARD = ENTITIES[0]
# More groups than are under way at once, and a last one that isn't full.
OWNERS_A_GROUP = 3
CARDS = OWNERS_A_GROUP * (GROUPS_MAX + 2) - 1
EVENTS_A_CARD = 2


class Written:
    """A batch of `CARDS` cards of its own, and what Redis holds of them."""

    def __init__(self, client: redis.Redis, url: str) -> None:
        self.client = client
        self.run = secrets.token_hex(6)
        self.job = TileJob(url, epoch=5, batch_id=1, now_ms=NOW_MS, retry_s=5)

    def batch(self) -> pa.RecordBatch:
        rows = CARDS * EVENTS_A_CARD
        return pa.RecordBatch.from_pydict(
            {
                "tag": [f"{CARD.name}:{self.run}-{i % CARDS}" for i in range(rows)],
                "txn": [i.to_bytes(8, "little") for i in range(rows)],
                "event_time_ms": [NOW_MS - i for i in range(rows)],
                "amount_minor": [100] * rows,
                "dim_a": pa.array([1] * rows, pa.int64()),
                "dim_b": pa.array([1] * rows, pa.int64()),
                "dim_c": pa.array([1] * rows, pa.int64()),
                "from_kafka": [i % 3 > 0 for i in range(rows)],
            }
        )

    def write(self) -> tuple[int, int]:
        """(entities written, entities unchanged)"""
        (out,) = merge_into_redis(self.job)([self.batch()])
        return out["written"][0].as_py(), out["unchanged"][0].as_py()

    def values(self) -> list[Any]:
        return [self.client.get(layout.tiles_key(CARD.name, f"{self.run}-{i}")) for i in range(CARDS)]


@pytest.fixture
def written(stack: Stack, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    monkeypatch.setattr(tiles, "OWNERS_MAX", OWNERS_A_GROUP)
    with redis.Redis.from_url(settings.redis) as client:
        yield Written(client, settings.redis)


def test_a_replayed_batch_of_many_groups_changes_nothing(written: Written) -> None:
    assert written.write() == (CARDS, 0)
    before = written.values()
    assert None not in before
    assert written.write() == (0, CARDS)
    assert written.values() == before


@pytest.mark.parametrize("breaks_at", range(1, 2 * CARDS // OWNERS_A_GROUP, 2))
def test_a_connection_that_breaks_at_any_reply_is_made_anew_and_every_entity_is_written_once(
    written: Written, monkeypatch: pytest.MonkeyPatch, breaks_at: int
) -> None:
    assert written.write() == (CARDS, 0)
    right = written.values()
    again = Written(written.client, written.job.redis_url)
    reads = [0]
    read = Wire.read

    def breaking(wire: Wire, count: int) -> list[Any]:
        reads[0] += 1
        if reads[0] == breaks_at + 1:
            wire.close()
            raise RedisConnectionError("on purpose")
        return read(wire, count)

    monkeypatch.setattr(Wire, "read", breaking)
    again.write()
    monkeypatch.undo()
    # The header names the key; the tiles behind it are the same, and no event is in them twice.
    header = layout.TILES_HEADER.size
    assert [value[header:] for value in again.values()] == [value[header:] for value in right]


def test_scripts_that_are_flushed_midway_are_loaded_again(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Wire.send
    sent = [0]

    def flushing(wire: Wire, commands: list[Any]) -> None:
        sent[0] += 1
        if sent[0] == GROUPS_MAX + 2:
            written.client.script_flush()
        send(wire, commands)

    monkeypatch.setattr(Wire, "send", flushing)
    written.write()
    assert None not in written.values()


def test_a_redis_that_is_down_is_tried_again_and_then_fails_the_batch(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [0]

    def refused(_wire: Wire, _url: str) -> None:
        tried[0] += 1
        raise RedisConnectionError("on purpose")

    monkeypatch.setattr(Wire, "__init__", refused)
    written.job = TileJob(written.job.redis_url, 5, 1, NOW_MS, retry_s=1)
    with pytest.raises(RedisUnavailableError):
        written.write()
    assert tried[0] > 2


def test_replies_come_in_the_order_of_the_commands_and_errors_are_raised(written: Written) -> None:
    with contextlib.closing(Wire(written.job.redis_url)) as wire:
        wire.send([("SET", written.run, 1), ("GET", written.run)])
        wire.send([("DEL", written.run)])
        assert wire.read(2) == [b"OK", b"1"]
        assert wire.read(1) == [1]
        with pytest.raises(ResponseError):
            wire.ask([("HGET", layout.PROGRESS_KEY)])
    with contextlib.closing(Wire(written.job.redis_url)) as wire, pytest.raises(NoScriptError):
        wire.ask([("EVALSHA", "0" * 40, 0)])
