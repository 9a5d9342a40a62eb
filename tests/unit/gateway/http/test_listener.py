"""Taking new connections, on uvloop as in the gateway, from real sockets."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from gateway.http.listener import ACCEPTED_MOST, Listener

CALLERS = 200


class Connected(asyncio.Protocol):
    """Greets whoever comes, and counts them."""

    def __init__(self, met: list[asyncio.BaseTransport]) -> None:
        self._met = met

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._met.append(transport)
        # uvloop's transports are none by inheritance.
        transport.write(b"hello")  # type: ignore[attr-defined]


def listening(kind: type[socket.socket] = socket.socket) -> socket.socket:
    sock = kind()
    sock.bind(("127.0.0.1", 0))
    sock.listen(CALLERS * 2)
    return sock


def callers(of: socket.socket, stack: contextlib.ExitStack, count: int = CALLERS) -> list[socket.socket]:
    """Connections that the kernel has made and nobody has taken yet."""
    return [stack.enter_context(socket.create_connection(of.getsockname(), timeout=10)) for _ in range(count)]


async def passes_until(condition: Callable[[], bool]) -> int:
    """Passes of the event loop; each ends with a look at the sockets."""
    async with asyncio.timeout(10):
        passes = 0
        while not condition():
            passes += 1
            await asyncio.sleep(0)
        return passes


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(test())  # type: ignore[arg-type]


async def taken_in_passes(serve: Callable[[socket.socket, list[asyncio.BaseTransport]], Awaitable[Callable[[], None]]]) -> int:
    met: list[asyncio.BaseTransport] = []
    with contextlib.ExitStack() as stack, listening() as sock:
        waiting = callers(sock, stack)
        close = await serve(sock.dup(), met)
        try:
            passes = await passes_until(lambda: len(met) == len(waiting))
        finally:
            close()
        assert {caller.recv(5) for caller in waiting} == {b"hello"}
        return passes


def test_callers_that_come_all_at_once_are_taken_in_a_few_passes_of_the_loop() -> None:
    async def ours(sock: socket.socket, met: list[asyncio.BaseTransport]) -> Callable[[], None]:
        return Listener(sock, lambda: Connected(met)).close

    async def uvloops(sock: socket.socket, met: list[asyncio.BaseTransport]) -> Callable[[], None]:
        return (await asyncio.get_running_loop().create_server(lambda: Connected(met), sock=sock)).close

    # Looking at the sockets, opening and greeting take a pass each.
    assert run(lambda: taken_in_passes(ours)) <= 3 * (CALLERS // ACCEPTED_MOST + 2)
    # Should uvloop take several as well one day, this module has no use any more.
    assert run(lambda: taken_in_passes(uvloops)) >= CALLERS


def test_who_listens_no_more_takes_nobody_and_keeps_whom_it_has() -> None:
    async def test() -> None:
        met: list[asyncio.BaseTransport] = []
        with contextlib.ExitStack() as stack, listening() as sock:
            listener = Listener(sock.dup(), lambda: Connected(met))
            [first] = callers(sock, stack, 1)
            await passes_until(lambda: len(met) == 1)
            listener.close()
            listener.close()
            callers(sock, stack, 1)
            await asyncio.sleep(0.05)  # sleeps: it must not be taken meanwhile
            assert len(met) == 1
            assert first.recv(5) == b"hello"
            met[0].write(b"still here")  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            assert first.recv(10) == b"still here"

    run(test)


class Troubled(socket.socket):
    """Has trouble with the first connections that it is to take."""

    trouble: list[int]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.trouble:
            raise OSError(self.trouble.pop(), "made by the test")
        return super().accept()


@pytest.mark.parametrize("trouble", [errno.EMFILE, errno.ENOBUFS, errno.EPROTO, errno.ECONNABORTED])
def test_trouble_with_one_connection_costs_the_others_nothing(trouble: int, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        met: list[asyncio.BaseTransport] = []
        with contextlib.ExitStack() as stack, listening(Troubled) as sock:
            sock.trouble = [trouble] * 2  # type: ignore[attr-defined]
            waiting = callers(sock, stack, 3)
            listener = Listener(sock, lambda: Connected(met))
            await passes_until(lambda: len(met) == len(waiting))
            listener.close()

    run(test)
    # Once, however often it was tried.
    assert caplog.text.count("no connection can be taken") == (trouble != errno.ECONNABORTED)


def test_it_can_be_closed_while_it_waits_for_file_descriptors() -> None:
    async def test() -> None:
        with contextlib.ExitStack() as stack, listening(Troubled) as sock:
            sock.trouble = [errno.EMFILE] * 100  # type: ignore[attr-defined]
            callers(sock, stack, 1)
            listener = Listener(sock, lambda: Connected([]))
            await passes_until(lambda: len(sock.trouble) < 100)  # type: ignore[attr-defined]
            listener.close()
            assert sock.fileno() == -1
            await asyncio.sleep(0.2)  # sleeps: past when it would have looked again

    run(test)
