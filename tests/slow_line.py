"""A TCP line that delays what goes over it, between a client and a server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from deploy.ports import free_ports
from tests.helpers import HOST

READ_BYTES = 65_536


class SlowLine:
    """Listens on `port` and passes on to `target_port`; what comes back is late by `delay_s`, which may change at any time."""

    def __init__(self, target_port: int) -> None:
        [self.port] = free_ports(1)
        self.delay_s = 0.0
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            writer.close()
            return
        self._writers += [writer, far_writer]
        for source, sink, delayed in ((reader, far_writer, False), (far_reader, writer, True)):
            task = self._loop.create_task(self._pass(source, sink, delayed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, delayed: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(READ_BYTES):
                if delayed and self.delay_s:
                    await asyncio.sleep(self.delay_s)  # sleeps: a line that is slow on purpose
                sink.write(data)
                await sink.drain()
        sink.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, HOST, self.port))
        self._loop.run_forever()

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0)
        self._loop.call_soon(self._loop.call_soon, self._loop.stop)

    @contextlib.contextmanager
    def running(self) -> Iterator[SlowLine]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            thread.join()
            self._loop.close()
