"""One connection to Redis that can't hand a reply to the wrong caller.

Commands are written in order and replies are read in order into a queue of futures. Nobody cancels a reply: a caller that has
waited long enough abandons the whole connection, which fails every other waiter on it, and a new one is made in the background.
A connection serves only after it has answered PING within the feature budget (half-open probing), so no batch ever waits for a
probe: while there is no good connection, `ready` is False and callers go on without. Used by gateway/redis/backend.py, and by
gateway/redis/cluster.py for each node of a cluster.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import hiredis
import numpy as np

from gateway.contracts.redis_address import REDIS_PORT
from gateway.kernels.resp import NO_REPLY, replies_end

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
RECONNECT_FIRST_S = 0.05
RECONNECT_MAX_S = 0.5
STRIKES_COUNTED_MAX = 8
# uvloop runs timers before it reads sockets: after a busy stretch a reply that has come may still lie in its socket.
GRACE_PASSES = 4

Argument = bytes | str | int
# A command's arguments, or the bytes of a whole command as they go over the wire.
Command = Sequence[Argument] | bytes
_INCOMPLETE = object()


class RedisUnavailableError(ConnectionError):
    """No connection, or it was abandoned before the reply came."""


class RedisReplyError(RuntimeError):
    """Redis answered with an error. The message is Redis' own."""


def _pack(command: Command) -> bytes:
    if isinstance(command, bytes):
        return command
    packed: bytes = hiredis.pack_command(tuple(command))  # type: ignore[arg-type]
    return packed


@dataclass(slots=True)
class _Due:
    """Replies that are due to commands which were written together: `left` of them, and parts of those that have begun.

    The future is that of one reply, or of a list of them in which an error of Redis' stands as a `RedisReplyError`, or of `raw` bytes.
    """

    future: asyncio.Future[Any]
    left: int
    one: bool = False
    raw: bool = False


class _Connection(asyncio.Protocol):
    """`pending` says, in order, which replies are due."""

    def __init__(self, lost: Callable[[], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.pending: deque[_Due] = deque()
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        # What has come of the first that is due; the end of it, where a line has begun; how much of what comes belongs to a value.
        self._parts: list[bytes] = []
        self._begun = b""
        self._skip = 0
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none by inheritance.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        while data:
            if not self.pending:
                self.abandon()
                return
            due = self.pending[0]
            looked_at = self._begun + data if self._begun else data
            at, due.left = replies_end(np.frombuffer(looked_at, np.uint8), self._skip, due.left)
            if at == NO_REPLY:
                self.abandon()
                return
            beyond = len(looked_at) - at
            if due.left or beyond < 0:
                self._parts.append(data)
                self._skip = max(0, -beyond)
                self._begun = looked_at[at:]
                return
            self._parts.append(data[: len(data) - beyond] if beyond else data)
            whole = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._begun, self._skip = b"", 0
            self.pending.popleft()
            self._resolve(due, whole)
            data = data[len(data) - beyond :] if beyond else b""

    def _resolve(self, due: _Due, whole: bytes) -> None:
        if due.future.done():
            return
        if due.raw:
            due.future.set_result(whole)
            return
        replies: list[Any] = []
        try:
            self._reader.feed(whole)
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                replies.append(RedisReplyError(str(reply)) if isinstance(reply, hiredis.ReplyError) else reply)
        except hiredis.ProtocolError:
            # The kernel looks at lengths alone: a number may be none.
            due.future.set_exception(RedisUnavailableError("the connection brought no replies"))
            due.future.exception()
            self.abandon()
            return
        if not due.one:
            due.future.set_result(replies)
        elif isinstance(replies[0], RedisReplyError):
            due.future.set_exception(replies[0])
            # As in `connection_lost`.
            due.future.exception()
        else:
            due.future.set_result(replies[0])

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        for due in self.pending:
            if not due.future.done():
                due.future.set_exception(RedisUnavailableError("connection lost"))
                # A future that nobody waits for any more is no error of the loop's.
                due.future.exception()
        self.pending.clear()
        self._lost()

    def abandon(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def send(self, command: Command) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.transport is None or self.transport.is_closing():
            future.set_exception(RedisUnavailableError("connection lost"))
            return future
        self.pending.append(_Due(future, 1, one=True))
        self.transport.write(_pack(command))
        return future

    def send_all(self, commands: Sequence[Command]) -> list[asyncio.Future[Any]]:
        """One write for all of `commands`. The connection must stand."""
        assert self.transport is not None
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        self.pending += [_Due(future, 1, one=True) for future in futures]
        self.transport.write(b"".join([_pack(command) for command in commands]))
        return futures

    def send_bundle(self, commands: Sequence[Command], replies: int, raw: bool) -> asyncio.Future[Any]:
        """Like `send_all`, with one future for all of the `replies`, at least one: as a list, or as `raw` bytes."""
        assert self.transport is not None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.pending.append(_Due(future, replies, raw=raw))
        self.transport.write(b"".join([_pack(command) for command in commands]))
        return future


@dataclass(slots=True)
class Sent:
    """Commands that were written to a link, and the future of their replies: a list, in which an error of Redis' is a `RedisReplyError`,
    or raw bytes.
    """

    link: RedisLink
    connection: _Connection
    replies: asyncio.Future[Any]


class RedisLink:
    """Keeps one probed connection to `url` (redis://[[user]:password@]host[:port][/db]) while started.

    `probe_s` is how long PING may take for a connection to be good. `greeting` are the commands that each new connection is sent
    before it serves, to load scripts.
    """

    def __init__(self, url: str, probe_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise ValueError("the Redis URL must look like redis://host:port/db")
        self.host, self._port, self._tls = parts.hostname, parts.port or REDIS_PORT, parts.scheme == "rediss"
        self._database = parts.path.strip("/") or "0"
        self._password = None if parts.password is None else unquote(parts.password)
        self._user = None if not parts.username else unquote(parts.username)
        self._probe_s = probe_s
        self._connection: _Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self.reconnects = 0
        # Abandoned connections in a row: each makes the pause before the next connection longer.
        self._strikes = 0
        self.greeting: list[tuple[Argument, ...]] = []

    @property
    def ready(self) -> bool:
        return self._connection is not None

    @property
    def address(self) -> str:
        return f"{self.host}:{self._port}"

    def start(self) -> None:
        """Begin to connect. The link serves when `ready` is True."""
        self._wanted.set()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        self.abandon()

    def send_all(self, commands: Sequence[Command]) -> list[asyncio.Future[Any]]:
        """The futures of some commands' replies, which nobody has to wait for. Raises `RedisUnavailableError`."""
        return self._standing().send_all(commands)

    def send(self, commands: Sequence[Command], replies: int | None = None, *, raw: bool = False) -> Sent:
        """Write some commands at once, for `replies_of` to wait for: one reply each unless told. Raises `RedisUnavailableError`.

        With `raw` the replies are left as they came over the wire, for `parsed` or a kernel.
        """
        connection = self._standing()
        return Sent(self, connection, connection.send_bundle(commands, len(commands) if replies is None else replies, raw))

    def _standing(self) -> _Connection:
        connection = self._connection
        if connection is None or connection.transport is None or connection.transport.is_closing():
            raise RedisUnavailableError("no connection")
        return connection

    async def call(self, command: Command, timeout_s: float) -> Any:
        """One command within `timeout_s`. Raises `RedisUnavailableError` (and abandons the connection) or `RedisReplyError`."""
        reply = await self._call(self._connection, command, timeout_s)
        self.in_time()
        return reply

    async def _call(self, connection: _Connection | None, command: Command, timeout_s: float) -> Any:
        if connection is None:
            raise RedisUnavailableError("no connection")
        future = connection.send(command)
        # asyncio.wait doesn't cancel what it waits for, unlike asyncio.wait_for.
        await asyncio.wait((future,), timeout=timeout_s)
        for _ in range(GRACE_PASSES):
            if future.done():
                break
            await asyncio.sleep(0)
        if not future.done():
            self.too_late(connection)
            raise RedisUnavailableError("no reply in time")
        return future.result()

    def too_late(self, connection: _Connection) -> None:
        """A reply on `connection` was waited for in vain: give it up."""
        self._strikes += 1
        connection.abandon()
        self._drop(connection)

    def in_time(self) -> None:
        """Replies came in time: the next connection, if one is needed, is made without a pause."""
        self._strikes = 0

    def abandon(self) -> None:
        """Give the connection up; a new one is made in the background."""
        connection = self._connection
        if connection is not None:
            connection.abandon()
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._wanted.set()

    async def _keep(self) -> None:
        """Connects whenever there is no connection, with growing pauses between attempts."""
        pause_s = RECONNECT_FIRST_S
        while True:
            await self._wanted.wait()
            if self._strikes > 1:
                # One late reply on a busy machine is no reason to stay away; the probe tells.
                await asyncio.sleep(min(RECONNECT_MAX_S, RECONNECT_FIRST_S * 2 ** min(self._strikes - 1, STRIKES_COUNTED_MAX)))
            try:
                await self._connect()
            except (OSError, RedisReplyError) as exc:
                if pause_s == RECONNECT_FIRST_S:
                    log.warning("redis: not reachable (%s), trying again", exc)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_MAX_S)
                continue
            if pause_s != RECONNECT_FIRST_S:
                log.info("redis: connected")
            pause_s = RECONNECT_FIRST_S
            self.reconnects += 1

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        holder: list[_Connection] = []

        def make() -> _Connection:
            holder.append(_Connection(lambda: self._drop(holder[0])))
            return holder[0]

        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(make, self.host, self._port, ssl=True if self._tls else None)
        connection = holder[0]
        try:
            if self._password is not None:
                auth = (self._user, self._password) if self._user else (self._password,)
                await self._call(connection, ("AUTH", *auth), CONNECT_TIMEOUT_S)
            await self._call(connection, ("SELECT", self._database), CONNECT_TIMEOUT_S)
            for command in self.greeting:
                await self._call(connection, command, CONNECT_TIMEOUT_S)
            await self._call(connection, ("PING",), self._probe_s)
        except (RedisUnavailableError, RedisReplyError, asyncio.CancelledError):
            connection.abandon()
            raise
        if connection.transport is None:
            raise RedisUnavailableError("connection lost")
        self._connection = connection
        self._wanted.clear()


def parsed(raw: bytes) -> list[Any]:
    """Replies that are all in `raw`; an error of Redis' is a `hiredis.ReplyError`."""
    reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
    reader.feed(raw)
    return list(iter(reader.gets, _INCOMPLETE))


async def replies_of(sent: Sequence[Sent], timeout_s: float) -> list[Any]:
    """The replies to all that was sent, to several links at once: what each future of theirs is of.

    Raises `RedisUnavailableError` when a link hasn't answered all within `timeout_s`: its connection is abandoned.
    """
    futures = [each.replies for each in sent]
    await asyncio.wait(futures, timeout=max(0.0, timeout_s))
    for _ in range(GRACE_PASSES):
        if all(future.done() for future in futures):
            break
        await asyncio.sleep(0)
    late = [each for each in sent if not each.replies.done()]
    for each in late:
        each.link.too_late(each.connection)
    if late:
        raise RedisUnavailableError("no reply in time")
    replies = [future.result() for future in futures]
    for each in sent:
        each.link.in_time()
    return replies
