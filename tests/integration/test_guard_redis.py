"""What gateways tell each other through Redis, on a real Redis Cluster: the guard's sightings, and the cap of exploration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gateway.contracts.routing import guard_cards_key, guard_counts_key
from gateway.metrics import Metrics
from gateway.models.explore import DAY_MS, LossCap
from gateway.models.guard import CHALLENGER_ONLY, MERCHANTS_MAX, Guard, Pair, Sighting
from gateway.models.model import ModelSlot
from gateway.redis.cluster import ClusterLink
from gateway.redis.sharing import Ask, SharedCap, asker
from tests.helpers import until
from tests.redis_nodes import Cluster, running_cluster
from tests.unit.gateway.factories import NOW_MS

pytestmark = pytest.mark.integration
DAY = NOW_MS // DAY_MS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def asking(cluster: Cluster, use: Callable[[Ask], Awaitable[None]]) -> None:
    async def run() -> None:
        link = ClusterLink(cluster.url, 5.0)
        link.start()
        try:
            await until(lambda: link.ready, 30)
            async with asyncio.timeout(60):
                await use(asker(link))
        finally:
            await link.stop()

    asyncio.run(run())


def make_guard(folder: Path, ask: Ask) -> Guard:
    return Guard(ModelSlot(folder), folder, Metrics(), ask=ask, now_ms=lambda: NOW_MS)


def test_a_card_that_two_gateways_saw_counts_once_and_merchants_are_bounded(cluster: Cluster, tmp_path: Path) -> None:
    async def use(ask: Ask) -> None:
        # A challenger is needed to judge, not to share.
        here, there = (Pair("pair", None) for _ in range(2))  # type: ignore[arg-type]
        for pair, first in ((here, 0), (there, 150)):
            for card in range(first, first + 200):
                pair.waiting.append(Sighting(0, CHALLENGER_ONLY, card, DAY, f"m{card}"))
        guards = make_guard(tmp_path, ask), make_guard(tmp_path, ask)
        assert await guards[0]._share(here) is None
        assert await guards[1]._share(there) is None
        assert not here.waiting
        assert there.known["0:1"] == 350
        assert sum(name.startswith("m:") for name in there.known) == MERCHANTS_MAX
        await guards[0]._share(here)
        assert here.known == there.known
        # A merchant that is known counts on, one more is not looked at.
        for card, merchant in ((1000, "m0"), (1001, "one too many")):
            here.waiting.append(Sighting(0, CHALLENGER_ONLY, card, DAY, merchant))
        await guards[0]._share(here)
        assert (here.known["0:1"], here.known["m:1:m0"]) == (352, 2)
        assert "m:1:one too many" not in here.known
        for key, most_s in ((guard_cards_key("pair", DAY), 2 * 86_400), (guard_counts_key("pair"), 30 * 86_400)):
            assert 0 < await ask(key, ("TTL", key), 1.0) <= most_s

    asking(cluster, use)


def test_what_gateways_explored_adds_up_over_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    async def use(ask: Ask) -> None:
        caps = [LossCap(lambda: 0.0, stale_s=10.0) for _ in range(2)]
        shared = [SharedCap(cap, ModelSlot(tmp_path), ask, Metrics(), lambda: NOW_MS) for cap in caps]
        for each in shared:
            await each.tick()
        caps[0].own_minor, caps[1].own_minor = 700, 300
        for each in (*shared, shared[0]):
            await each.tick()
        assert [cap.spent_minor for cap in caps] == [1000, 1000]
        assert all(cap.usable and cap.own_minor == 0 for cap in caps)

    asking(cluster, use)
