"""The gateway's store on a Redis at its memory limit: writes are refused loudly, reads go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from gateway.contracts import layout
from gateway.redis.link import RedisLink
from gateway.redis.store import Observation, Store
from gateway.scoring.job import requests_of
from tests.entities import Entities, make_stream, redis_server
from tests.helpers import until

pytestmark = pytest.mark.integration

MEMORY_BYTES = 4 * 2**20


@pytest.fixture
def full(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Redis with a few megabytes that refuses writes beyond them."""
    with redis_server(tmp_path) as client:
        yield client


def fill(client: redis.Redis) -> None:
    """Something else takes all the memory that there is."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", MEMORY_BYTES)
    with pytest.raises(redis.exceptions.ResponseError, match="maxmemory"):
        for i in range(MEMORY_BYTES // 65_536 + 1):
            client.set(f"ballast-{i}", b"x" * 65_536)


def test_at_the_memory_limit_writes_are_refused_loudly_and_reads_go_on(full: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    entities = Entities(full)
    *before, probe = make_stream(1, 40, 60_000, 0)
    entities.look(before)
    entities.tile(before[:20])
    entities.say_progress()
    expected = entities.look([probe], update=False)
    fill(full)
    held = {key: full.get(key) for key in full.scan_iter(match=f"{layout.PREFIX}:*")}

    async def observe(update: bool) -> tuple[Observation | None, int]:
        link = RedisLink(f"redis://127.0.0.1:{full.get_connection_kwargs()['port']}/0", probe_s=5)
        store = Store(link, 600_000, now_ms=lambda: entities.now_ms)
        link.start()
        await until(lambda: link.ready, 10)
        try:
            found = await store.observe([entities.job(probe)], requests_of([entities.job(probe)]), 5.0, update)
            job = entities.job(probe)
            store.record([(job, job.claim + b"answer")])
            await until(lambda: store.failed_records == 1, 10)
            return found, store.refused_writes
        finally:
            await link.stop()

    found, refused = asyncio.run(observe(update=True))
    assert found is not None
    assert found.matrix.tobytes() == expected.matrix.tobytes()
    assert found.stale.tolist() == [True]
    assert set(found.seq.ravel().tolist()) == {-1}
    assert refused == 1
    assert "OOM" in caplog.text
    looked, refused = asyncio.run(observe(update=False))
    assert looked is not None
    assert looked.matrix.tobytes() == expected.matrix.tobytes()
    assert refused == 0
    # Nothing is half written, and with memory again it goes on.
    assert {key: full.get(key) for key in held} == held
    full.config_set("maxmemory", 0)
    assert entities.look([probe]).seq.max() > 0
    progress = full.get(layout.PROGRESS_KEY)
    assert isinstance(progress, bytes)
    assert msgspec.msgpack.decode(progress, type=layout.Progress).batch_id == 1
