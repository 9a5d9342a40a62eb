"""The pipe between the sender and what feeds Kafka for it, with no Kafka behind it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import numpy as np

from loadtest.openloop.feed import LENGTH, Payment, Told, encoder, payments
from loadtest.openloop.outcomes import ACKNOWLEDGED, FAILED

SENT = [Payment(i, float(i), f"card-{i}", b"x" * (i * 1000)) for i in range(200)]


async def read(pipe: int) -> list[Payment]:
    return [payment async for payment in payments(pipe)]


def test_payments_come_out_as_they_went_in_however_they_are_cut() -> None:
    reader, writer = os.pipe()
    data = b"".join(LENGTH.pack(len(e)) + e for e in map(encoder.encode, SENT))

    def write() -> None:
        for at in range(0, len(data), 7919):
            os.write(writer, data[at : at + 7919])
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert asyncio.run(read(reader)) == SENT
    finally:
        thread.join()


def test_what_became_of_each_is_kept_with_its_latency(tmp_path: Path) -> None:
    told = Told()
    due_s = time.monotonic() - 1.0
    told.note(9, ACKNOWLEDGED, due_s)
    told.note(19, FAILED, due_s)
    told.save(tmp_path / "feed.npz")
    with np.load(tmp_path / "feed.npz") as found:
        assert found["number"].tolist() == [9, 19]
        assert found["status"].tolist() == [ACKNOWLEDGED, FAILED]
        assert (found["latency_us"] >= 1_000_000).all()
