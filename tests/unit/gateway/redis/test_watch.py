"""What Redis tells of itself is exported, node by node, and a node that is silent harms nobody."""

from __future__ import annotations

from typing import Any, cast

import pytest

from gateway.metrics import Metrics
from gateway.redis.link import Command, RedisLink, RedisUnavailableError
from gateway.redis.watch import RedisWatch, fields_of

pytestmark = pytest.mark.anyio

MEMORY = b"# Memory\r\nused_memory:1048576\r\nused_memory_human:1.00M\r\nmaxmemory:4194304\r\n"
CLIENTS = b"# Clients\r\nconnected_clients:7\r\n"


class FakeNode(RedisLink):
    """Answers INFO from what is set by hand."""

    def __init__(self, port: int) -> None:
        super().__init__(f"redis://127.0.0.1:{port}/0", 1.0)
        self.up = True
        self.silent = False

    @property
    def ready(self) -> bool:
        return self.up

    async def call(self, command: Command, timeout_s: float) -> Any:
        if self.silent:
            raise RedisUnavailableError
        return {"memory": MEMORY, "clients": CLIENTS}[cast(str, command[1])]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def test_memory_its_limit_and_connections_are_told_by_node() -> None:
    metrics, node = Metrics(), FakeNode(7001)
    node.reconnects = 3
    watch = RedisWatch([node], node, metrics)
    await watch.look()
    await watch.look()
    at = {"node": "127.0.0.1:7001"}
    assert value(metrics, "fraudgate_redis_memory_used_bytes", **at) == 1_048_576
    assert value(metrics, "fraudgate_redis_memory_limit_bytes", **at) == 4_194_304
    assert value(metrics, "fraudgate_redis_clients", **at) == 7
    assert value(metrics, "fraudgate_redis_connects_total") == 3
    assert value(metrics, "fraudgate_redis_ready") == 1


async def test_a_silent_node_keeps_what_it_last_said_and_a_lost_one_is_not_asked() -> None:
    metrics, node = Metrics(), FakeNode(7001)
    watch = RedisWatch([node], node, metrics)
    await watch.look()
    node.silent = True
    await watch.look()
    node.up = False
    await watch.look()
    assert value(metrics, "fraudgate_redis_clients", node="127.0.0.1:7001") == 7
    assert value(metrics, "fraudgate_redis_ready") == 0


def test_the_fields_of_info_are_read_whatever_stands_between_them() -> None:
    assert fields_of([MEMORY, b"\r\n# Clients\r\nnonsense\r\n" + CLIENTS]) == {
        "used_memory": "1048576",
        "used_memory_human": "1.00M",
        "maxmemory": "4194304",
        "connected_clients": "7",
    }
