"""One blocking connection to Redis for commands in bulk: packed and parsed by hiredis, without an object or a check per command.

With redis-py's pipeline an entity cost a worker 26 us, with this 15 (docs/pipeline.md). Several requests may be under way: replies
come in the order of the commands. An error leaves the connection useless; it is closed by whoever opened it. Used by tiles.py.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import hiredis
import redis
from redis.exceptions import BusyLoadingError, NoScriptError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from feature_jobs.redis_client import SOCKET_TIMEOUT_S, cluster_pipelined, connect
from gateway.contracts.redis_address import is_cluster

RECEIVED_BYTES_MAX = 1 << 18
_INCOMPLETE = object()
_ERRORS: dict[str, type[ResponseError | RedisConnectionError]] = {"NOSCRIPT": NoScriptError, "LOADING": BusyLoadingError}

Command = tuple[Any, ...]


class Bulk(Protocol):
    """Commands in bulk, replies in their order. Raises redis-py's errors, also for an error among the replies."""

    def send(self, commands: Sequence[Command]) -> None: ...

    def read(self, count: int) -> list[Any]:
        """The next `count` replies."""

    def load_script(self, text: str) -> None: ...

    def close(self) -> None: ...


class Wire:
    """To one Redis."""

    def __init__(self, url: str) -> None:
        """Connects, and does what the URL asks for: TLS, AUTH, SELECT."""
        pool = redis.ConnectionPool.from_url(url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S)
        connection: Any = pool.make_connection()
        connection.connect()
        self._connection = connection
        # From here on nobody reads or writes but this class.
        self._socket: socket.socket = connection._sock
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)

    def close(self) -> None:
        self._connection.disconnect()

    def send(self, commands: Sequence[Command]) -> None:
        """Numbers among the arguments are whole. Memory: all commands at once."""
        try:
            self._socket.sendall(b"".join([hiredis.pack_command(c) for c in commands]))
        except TimeoutError as exc:
            raise RedisTimeoutError("Redis takes no more commands") from exc
        except OSError as exc:
            raise RedisConnectionError(f"the connection to Redis broke: {exc}") from exc

    def read(self, count: int) -> list[Any]:
        """The next `count` replies. Raises for the first error among them."""
        replies: list[Any] = []
        gets, reader = self._reader.gets, self._reader
        while len(replies) < count:
            reply = gets()
            if reply is _INCOMPLETE:
                reader.feed(self._receive())
            elif isinstance(reply, hiredis.ReplyError):
                text = str(reply)
                raise _ERRORS.get(text.partition(" ")[0], ResponseError)(text)
            else:
                replies.append(reply)
        return replies

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        self.send(commands)
        return self.read(len(commands))

    def load_script(self, text: str) -> None:
        self.ask([("SCRIPT", "LOAD", text)])

    def _receive(self) -> bytes:
        try:
            data: bytes = self._socket.recv(RECEIVED_BYTES_MAX)
        except TimeoutError as exc:
            raise RedisTimeoutError("Redis did not answer") from exc
        except OSError as exc:
            raise RedisConnectionError(f"the connection to Redis broke: {exc}") from exc
        if not data:
            raise RedisConnectionError("Redis closed the connection")
        return data


class ClusterWire:
    """To a Redis Cluster: redis-py's client, a pipeline a node. What is sent is answered before the next is."""

    def __init__(self, client: redis.RedisCluster) -> None:
        self._client = client
        self._replies: deque[Any] = deque()

    def close(self) -> None:
        self._client.close()

    def send(self, commands: Sequence[Command]) -> None:
        self._replies += cluster_pipelined(self._client, commands)

    def read(self, count: int) -> list[Any]:
        return [self._replies.popleft() for _ in range(count)]

    def load_script(self, text: str) -> None:
        self._client.script_load(text)


def bulk(url: str) -> Bulk:
    """A connection to be closed by the caller."""
    if not is_cluster(url):
        return Wire(url)
    client = connect(url)
    assert isinstance(client, redis.RedisCluster)
    return ClusterWire(client)


@contextlib.contextmanager
def connected(url: str) -> Iterator[Bulk]:
    wire = bulk(url)
    try:
        yield wire
    finally:
        wire.close()
