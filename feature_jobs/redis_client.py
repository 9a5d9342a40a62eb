"""The feature jobs' way to Redis: redis-py's client for one Redis, its cluster client for a Redis Cluster (setting `redis_url`).

Called by the driver (feature_jobs/silver.py) and by the workers that write tiles (feature_jobs/tiles.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import redis
from redis.cluster import ClusterNode
from redis.exceptions import AskError, ClusterDownError, RedisClusterException, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.contracts import layout
from gateway.contracts.redis_address import REDIS_PORT, cluster_seeds, hash_slot, is_cluster

SOCKET_TIMEOUT_S = 5.0
PIPELINE_COMMANDS_MAX = 256

Client = redis.Redis | redis.RedisCluster


def connect(url: str) -> Client:
    """A client to be closed by the caller. A cluster is asked for its slots at once: raises redis' ConnectionError."""
    timeouts: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S}
    if not is_cluster(url):
        return redis.Redis.from_url(url, **timeouts)
    seeds = [urlsplit(seed) for seed in cluster_seeds(url)]
    first = seeds[0]
    with _unavailable_as_connection_error():
        return redis.RedisCluster(
            startup_nodes=[ClusterNode(seed.hostname, seed.port or REDIS_PORT) for seed in seeds],  # type: ignore[no-untyped-call]
            # Names stay good when every node has got a new address.
            dynamic_startup_nodes=False,
            username=unquote(first.username) if first.username else None,
            password=None if first.password is None else unquote(first.password),
            ssl=first.scheme == "rediss",
            **timeouts,
        )


def run_id(client: Client) -> str:
    """Names this life of Redis: a restart changes it. Of a cluster the ids of all masters, which a failover changes too."""
    if not isinstance(client, redis.RedisCluster):
        return str(client.info("server")["run_id"])
    with _unavailable_as_connection_error():
        masters = [client.get_redis_connection(node) for node in client.get_primaries()]  # type: ignore[no-untyped-call]
        return "+".join(sorted(str(master.info("server")["run_id"]) for master in masters))


def get_progress(client: Client) -> layout.Progress | None:
    """How far the tiles have got.

    A cluster's masters fail one by one, so the record stands in many slots: it counts as far as all copies do, and None stands for
    a copy that is missing or of another epoch.
    """
    if not isinstance(client, redis.RedisCluster):
        return _decoded(client.get(layout.PROGRESS_KEY))
    keys = [layout.PROGRESS_KEY, *layout.PROGRESS_COPY_KEYS]
    found = [_decoded(value) for value in cluster_pipelined(client, [("GET", key) for key in keys])]
    held = [record for record in found if record is not None]
    if len(held) < len(found) or len({record.epoch for record in held}) > 1:
        return None
    return min(held, key=lambda record: record.batch_id)


def set_progress(client: Client, progress: layout.Progress) -> None:
    """Say how far the tiles have got, last where the gateway reads it."""
    value = msgspec.msgpack.encode(progress)
    if isinstance(client, redis.RedisCluster):
        cluster_pipelined(client, [("SET", key, value) for key in layout.PROGRESS_COPY_KEYS])
    client.set(layout.PROGRESS_KEY, value)


def _decoded(value: Any) -> layout.Progress | None:
    return None if value is None else msgspec.msgpack.decode(value, type=layout.Progress)


def pipelined(client: Client, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The replies to `commands` (GET, SET or EVALSHA), sent a bounded number at a time. Raises the first error among the replies."""
    if isinstance(client, redis.RedisCluster):
        return cluster_pipelined(client, commands)
    replies: list[Any] = []
    for first in range(0, len(commands), PIPELINE_COMMANDS_MAX):
        pipe = client.pipeline(transaction=False)
        for command in commands[first : first + PIPELINE_COMMANDS_MAX]:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        replies += pipe.execute()
    return replies


def cluster_pipelined(client: redis.RedisCluster, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The replies to `commands` (GET, SET or EVALSHA), a pipeline a node, each node's in their order.

    Raises the first error among the replies, and redis' ConnectionError where a slot can't be reached or is on the move.
    """
    replies: list[Any] = [None] * len(commands)
    with _unavailable_as_connection_error():
        by_node: dict[str, list[int]] = {}
        for i, command in enumerate(commands):
            by_node.setdefault(client.nodes_manager.get_node_from_slot(hash_slot(_key(command))).name, []).append(i)
        for name, indices in by_node.items():
            node = client.get_redis_connection(client.get_node(node_name=name))  # type: ignore[no-untyped-call]
            for first in range(0, len(indices), PIPELINE_COMMANDS_MAX):
                part = indices[first : first + PIPELINE_COMMANDS_MAX]
                try:
                    answers = _one_pipeline(node, [commands[i] for i in part])
                except (RedisConnectionError, RedisTimeoutError):
                    client.nodes_manager.initialize()
                    raise
                for i, answer in zip(part, answers, strict=True):
                    # The cluster client follows a slot that moves.
                    moves = isinstance(answer, AskError | TryAgainError)
                    replies[i] = client.execute_command(*commands[i]) if moves else answer  # type: ignore[no-untyped-call]
    for reply in replies:
        if isinstance(reply, ResponseError):
            raise reply
    return replies


def _one_pipeline(node: redis.Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    with node.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        return pipe.execute(raise_on_error=False)


def _key(command: tuple[Any, ...]) -> str:
    key = command[3] if command[0] == "EVALSHA" else command[1]
    assert isinstance(key, str)
    return key


@contextlib.contextmanager
def _unavailable_as_connection_error() -> Iterator[None]:
    """What a cluster adds to the ways of being out of reach, as the one error that callers try again for."""
    try:
        yield
    except (RedisClusterException, ClusterDownError, AskError, TryAgainError) as exc:
        raise RedisConnectionError(str(exc)) from exc
