"""Reasons are worked out beside the event loop, within what time there is, and what is late stays without."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import numpy.typing as npt
import pytest

from gateway.contracts.features import FEATURES
from gateway.contracts.reasons import Reason
from gateway.explanations.reasons import Reasoner
from gateway.metrics import Metrics

pytestmark = pytest.mark.anyio

FAR_S = 60.0
CHUNK_ROWS = 8


def rows(n: int) -> npt.NDArray[np.float32]:
    return np.arange(n * len(FEATURES), dtype=np.float32).reshape(n, len(FEATURES))


class Told:
    """Explains with what it was told to, once it may; remembers which rows it saw and in which thread."""

    rows_at_once = CHUNK_ROWS

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.began = threading.Event()
        self.seen: list[npt.NDArray[np.float32]] = []
        self.threads: set[int] = set()

    def codes(self, matrix: npt.NDArray[np.float32]) -> list[list[Reason]]:
        self.began.set()
        assert self.may.wait(FAR_S)
        self.seen.append(matrix)
        self.threads.add(threading.get_ident())
        return [[Reason.NEW_DEVICE]] * len(matrix)


def counted(metrics: Metrics) -> dict[str, float]:
    [family] = metrics.reasons.collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total") and s.value}


async def test_each_row_gets_its_codes_in_another_thread() -> None:
    metrics, told = Metrics(), Told()
    reasoner = Reasoner(metrics)
    found = await reasoner.codes(told, rows(2 * CHUNK_ROWS + 3), time.monotonic() + FAR_S)
    reasoner.stop()
    assert found == [[Reason.NEW_DEVICE]] * (2 * CHUNK_ROWS + 3)
    assert np.array_equal(np.concatenate(told.seen), rows(2 * CHUNK_ROWS + 3))
    assert threading.get_ident() not in told.threads
    assert counted(metrics) == {"model": 2 * CHUNK_ROWS + 3}


async def test_a_model_without_explanation_is_counted() -> None:
    metrics = Metrics()
    assert await Reasoner(metrics).codes(None, rows(3), time.monotonic() + FAR_S) == [[], [], []]
    assert counted(metrics) == {"unexplained": 3}


async def test_what_has_no_time_is_not_begun() -> None:
    metrics, told = Metrics(), Told()
    assert await Reasoner(metrics).codes(told, rows(2), time.monotonic()) == [[], []]
    assert not told.seen
    assert counted(metrics) == {"late": 2}


async def test_what_is_late_is_given_up_while_the_loop_goes_on() -> None:
    metrics, told = Metrics(), Told()
    told.may.clear()
    reasoner = Reasoner(metrics)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    given = rows(2)
    assert await reasoner.codes(told, given, time.monotonic() + 0.05) == [[], []]
    counting.cancel()
    assert turns > 10
    assert counted(metrics) == {"late": 2}
    # Whoever goes on with the batch may change its rows: the thread has its own.
    given[:] = -1
    told.may.set()
    assert await reasoner.codes(told, rows(1), time.monotonic() + FAR_S) == [[Reason.NEW_DEVICE]]
    reasoner.stop()
    assert np.array_equal(told.seen[0], rows(2))


async def test_a_batch_that_is_long_gets_as_many_as_there_is_time_for() -> None:
    metrics, told = Metrics(), Told()
    now_s = [0.0]

    def clock_s() -> float:
        # Two chunks take all the time there is.
        return now_s[0] + len(told.seen) * 0.5

    reasoner = Reasoner(metrics, clock_s)
    found = await reasoner.codes(told, rows(4 * CHUNK_ROWS), 1.0)
    reasoner.stop()
    assert [bool(codes) for codes in found] == [True] * 2 * CHUNK_ROWS + [False] * 2 * CHUNK_ROWS
    assert counted(metrics) == {"model": 2 * CHUNK_ROWS, "late": 2 * CHUNK_ROWS}
