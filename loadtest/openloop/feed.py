"""`python -m loadtest.openloop.feed`: puts on Kafka what it reads from standard input; notes when each was acknowledged.

The Kafka side of `loadtest.openloop.steady`, in a process of its own, which goes before nobody, and with aiokafka: librdkafka's idempotent
producer keeps a core busy, for seconds now and then, until a broker that came back has taken what waited (its issue 2565).

Ends when standard input does, after FLUSH_S at most, and then writes the columns `number`, `status` and `latency_us` to a file (.npz).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiokafka import AIOKafkaProducer

from gateway.contracts.settings import load_settings
from gateway.contracts.topics import TRANSACTIONS
from loadtest.openloop.outcomes import ACKNOWLEDGED, FAILED, NOT_SENT, Log

LINGER_MS = 20
# Kafka's limit for a batch is a megabyte.
BATCH_BYTES_MAX = 900_000
# A broker may be away for minutes.
GIVE_UP_S = 300.0
FLUSH_S = 120.0
# What the pipe hasn't taken: minutes of payments.
WAITING_BYTES_MAX = 64 * 1024 * 1024
LENGTH = struct.Struct("<I")
encoder = msgspec.msgpack.Encoder()


class Payment(msgspec.Struct, array_like=True):
    """`due_s` is of the machine's monotonic clock."""

    number: int
    due_s: float
    card: str
    body: bytes


decoder = msgspec.msgpack.Decoder(Payment)


class Feeder:
    """The sender's end. `submit` never waits: what the pipe doesn't take is kept for the next `turn`."""

    def __init__(self, log: Log, folder: Path) -> None:
        self._log = log
        self._out = folder / f"feed-{os.getpid()}.npz"
        # In a session of its own: it isn't to go before anybody.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.openloop.feed", "--out", str(self._out)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self._waiting = bytearray()

    def submit(self, number: int, due_s: float, card: str, body: bytes, now: float) -> None:
        log = self._log
        log.late_us[number], log.attempts[number] = int((now - due_s) * 1e6), 1
        if len(self._waiting) > WAITING_BYTES_MAX:
            log.status[number] = NOT_SENT
            return
        payment = encoder.encode(Payment(number, due_s, card, body))
        self._waiting += LENGTH.pack(len(payment)) + payment

    def turn(self) -> None:
        if not self._waiting:
            return
        try:
            del self._waiting[: os.write(self._pipe, self._waiting)]
        except BlockingIOError:
            return

    def finish(self) -> int:
        """Wait for what is under way and note what became of it. Returns how many Kafka has not acknowledged."""
        os.set_blocking(self._pipe, True)
        while self._waiting:
            self.turn()
        assert self._process.stdin is not None
        self._process.stdin.close()
        # It waits for Kafka twice, and then writes its file.
        self._process.wait(3 * FLUSH_S)
        with np.load(self._out, allow_pickle=False) as found:
            told = {name: found[name].tolist() for name in ("number", "status", "latency_us")}
        self._out.unlink()
        for number, status, latency_us in zip(*told.values(), strict=True):
            self._log.status[number], self._log.latency_us[number] = status, latency_us
        return sum(status != ACKNOWLEDGED for status in told["status"])


async def payments(pipe: int) -> AsyncIterator[Payment]:
    """What comes through the pipe until it is closed."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", buffering=0))
    try:
        while True:
            try:
                size = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
                yield decoder.decode(await reader.readexactly(size))
            except asyncio.IncompleteReadError:
                return
    finally:
        transport.close()


class Told:
    """What became of each payment, in the order in which it was known."""

    def __init__(self) -> None:
        self.number, self.status, self.latency_us = array("q"), array("h"), array("i")

    def note(self, number: int, status: int, due_s: float) -> None:
        self.number.append(number)
        self.status.append(status)
        self.latency_us.append(int((time.monotonic() - due_s) * 1e6))

    def delivered(self, payment: Payment, future: asyncio.Future[Any]) -> None:
        failed = future.cancelled() or future.exception() is not None
        self.note(payment.number, FAILED if failed else ACKNOWLEDGED, payment.due_s)

    def save(self, path: Path) -> None:
        np.savez(path, number=np.array(self.number), status=np.array(self.status), latency_us=np.array(self.latency_us))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m loadtest.openloop.feed", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write what became of each payment (.npz)")
    options = parser.parse_args(argv)
    # Whoever feeds it decides when it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told = Told()
    asyncio.run(feed(told))
    told.save(options.out)
    return 0


async def feed(told: Told) -> None:
    # What a batch of a partition has no room for waits in the pipe, and then in the sender.
    producer = AIOKafkaProducer(
        bootstrap_servers=load_settings().bootstrap,
        enable_idempotence=True,
        linger_ms=LINGER_MS,
        max_batch_size=BATCH_BYTES_MAX,
        request_timeout_ms=int(GIVE_UP_S * 1000),
    )
    await producer.start()
    under_way: set[asyncio.Future[Any]] = set()
    async for payment in payments(sys.stdin.fileno()):
        future = await producer.send(TRANSACTIONS, payment.body, payment.card.encode())
        under_way.add(future)
        future.add_done_callback(under_way.discard)
        future.add_done_callback(partial(told.delivered, payment))
    if under_way:
        await asyncio.wait(under_way, timeout=FLUSH_S)
    for future in under_way.copy():
        future.cancel()
    # A callback runs in the next pass of the loop.
    await asyncio.sleep(0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FLUSH_S):
            await producer.stop()


if __name__ == "__main__":
    sys.exit(main())
