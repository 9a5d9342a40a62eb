import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import hiredis
import pytest

from gateway.redis.link import RedisLink, RedisReplyError, RedisUnavailableError, parsed, replies_of
from tests.helpers import until
from tests.resp import Status, encoded

pytestmark = pytest.mark.anyio

Answerer = Callable[[list[bytes]], Awaitable[bytes]]


@asynccontextmanager
async def serving(answer: Answerer, probe_s: float = 1.0) -> AsyncIterator[RedisLink]:
    """A link to a server that answers each command with the bytes that `answer` gives."""

    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        commands = hiredis.Reader(notEnoughData=Ellipsis)
        try:
            while data := await reader.read(65_536):
                commands.feed(data)
                while (command := commands.gets()) is not Ellipsis:
                    writer.write(await answer(command))
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = RedisLink(f"redis://127.0.0.1:{port}/0", probe_s)
    link.start()
    try:
        yield link
    finally:
        await link.stop()
        server.close()
        if handlers:
            await asyncio.wait(handlers, timeout=5)
            await asyncio.sleep(0)


async def until_ready(link: RedisLink) -> None:
    await until(lambda: link.ready, 5)


async def ok_or(command: list[bytes], echo: bytes = b"+OK\r\n") -> bytes:
    return b"$%d\r\n%s\r\n" % (len(command[1]), command[1]) if command[0] == b"GET" else echo


async def silent(command: list[bytes]) -> bytes:
    """To what the link itself asks there is an answer."""
    return b"" if command[0] == b"GET" else b"+OK\r\n"


async def test_replies_come_in_the_order_of_the_commands() -> None:
    async with serving(ok_or) as link:
        await until_ready(link)
        replies = await asyncio.gather(*(link.call(("GET", f"k{i}"), 5) for i in range(100)))
        assert replies == [f"k{i}".encode() for i in range(100)]


async def test_an_error_reply_belongs_to_its_command_alone() -> None:
    async def answer(command: list[bytes]) -> bytes:
        return b"-ERR no\r\n" if command[:2] == [b"GET", b"bad"] else await ok_or(command)

    async with serving(answer) as link:
        await until_ready(link)
        with pytest.raises(RedisReplyError, match="ERR no"):
            await link.call(("GET", "bad"), 5)
        assert await link.call(("GET", "good"), 5) == b"good"


async def test_an_abandoned_reply_never_reaches_another_caller() -> None:
    release = asyncio.Event()

    async def answer(command: list[bytes]) -> bytes:
        if command[:2] == [b"GET", b"slow"]:
            await release.wait()
        return await ok_or(command)

    async with serving(answer) as link:
        await until_ready(link)
        with pytest.raises(RedisUnavailableError):
            await link.call(("GET", "slow"), 0.01)
        assert not link.ready
        release.set()
        await until_ready(link)
        assert await link.call(("GET", "mine"), 5) == b"mine"
        assert link.reconnects == 2


@pytest.mark.parametrize("raw", [True, False])
async def test_replies_that_come_in_pieces_are_put_together(raw: bool) -> None:
    values = [b"", None, b"\r\n$3\r\n*1\r\n", b"v" * 100_000]
    reply = encoded(Status("QUEUED")) + encoded([values, [b"x"], 7])
    cuts = [0, *range(1, 80), 30_000, *range(len(reply) - 30, len(reply) + 1)]
    pieces = [reply[a:b] for a, b in pairwise(cuts)]

    def received(connection: asyncio.Protocol) -> None:
        # As a socket might bring them, and the next reply with the last piece.
        for piece in pieces[:-1]:
            connection.data_received(piece)
        connection.data_received(pieces[-1] + encoded(b"next"))

    async with serving(silent) as link:
        await until_ready(link)
        sent, following = link.send([b"*2\r\n$3\r\nGET\r\n$1\r\nx\r\n"], 2, raw=raw), link.send_all([("GET", "unheard")])
        received(sent.connection)
        [found] = await replies_of([sent], 5)
        assert (parsed(found) if raw else found) == [b"QUEUED", [values, [b"x"], 7]]
        assert await following[0] == b"next"


@pytest.mark.parametrize("odd", [b"HTTP/1.1 400 Bad Request\r\n", b":three\r\n"])
async def test_what_is_no_reply_costs_the_connection(odd: bytes) -> None:
    async def answer(command: list[bytes]) -> bytes:
        return odd if command[:2] == [b"GET", b"odd"] else await ok_or(command)

    async with serving(answer) as link:
        await until_ready(link)
        with pytest.raises(RedisUnavailableError):
            await link.call(("GET", "odd"), 5)
        await until(lambda: link.reconnects == 2, 5)
        assert await link.call(("GET", "good"), 5) == b"good"


async def test_a_cancelled_caller_leaves_the_connection_in_step() -> None:
    async def answer(command: list[bytes]) -> bytes:
        await asyncio.sleep(0.01)  # sleeps: a Redis that takes its time
        return await ok_or(command)

    async with serving(answer) as link:
        await until_ready(link)
        first = asyncio.create_task(link.call(("GET", "first"), 5))
        await asyncio.sleep(0)
        first.cancel()
        assert await link.call(("GET", "second"), 5) == b"second"


async def test_a_server_that_is_slower_than_the_budget_never_serves() -> None:
    pinged = asyncio.Event()

    async def answer(command: list[bytes]) -> bytes:
        if command[0] == b"PING":
            pinged.set()
            await asyncio.sleep(0.05)  # sleeps: a Redis slower than the probe allows
        return await ok_or(command)

    async with serving(answer, probe_s=0.01) as link:
        async with asyncio.timeout(5):
            await pinged.wait()
        await asyncio.sleep(0.1)  # sleeps: until the late reply has come
        assert not link.ready
        with pytest.raises(RedisUnavailableError):
            await link.call(("GET", "x"), 5)


async def test_without_a_server_callers_go_on_at_once() -> None:
    link = RedisLink("redis://127.0.0.1:9/0", 1.0)
    link.start()
    with pytest.raises(RedisUnavailableError):
        await link.call(("GET", "x"), 5)
    with pytest.raises(RedisUnavailableError):
        link.send_all([("GET", "x")])
    await link.stop()


def test_a_url_that_is_no_redis_is_refused() -> None:
    with pytest.raises(ValueError, match="redis://"):
        RedisLink("http://127.0.0.1", 1.0)
