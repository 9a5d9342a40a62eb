import asyncio
from typing import Any

import msgspec
import pytest

from gateway.console.tap import APPROVED_PER_S_MAX, NOTABLE_PER_S_MAX, WAITING_MAX, Tap
from gateway.console.viewers import END, FRAMES_WAITING_MAX, Viewers
from gateway.contracts.decision import ModelRef, Outcome
from gateway.metrics import Metrics
from gateway.scoring.job import Result, Verdict
from tests.unit.gateway.console.factories import Clock
from tests.unit.gateway.factories import make_answer, make_job

pytestmark = pytest.mark.anyio


def result(outcome: Outcome = Outcome.APPROVE, score: int = 10, route: str = "champion", receipt: bytes = b"r") -> Result:
    answer = msgspec.structs.replace(
        make_answer(), decision=outcome, risk_score=score, model=ModelRef(name="m", version="1", route=route)
    )
    return Result(make_job(), Verdict.DECIDED, answer=answer, receipt=receipt)


def test_what_is_not_approved_is_kept_before_what_is_and_both_are_bounded_a_second() -> None:
    clock = Clock()
    tap = Tap(clock)
    tap.offer([result(receipt=b"a")] * 50 + [result(Outcome.DECLINE, 990, receipt=b"d")] * 50)
    taken = tap.take()
    assert (taken.count(b"a"), taken.count(b"d")) == (APPROVED_PER_S_MAX, NOTABLE_PER_S_MAX)
    tap.offer([result(Outcome.REVIEW)] * 3)
    assert tap.take() == []
    clock.now_s += 1
    tap.offer([result(Outcome.REVIEW)] * 3)
    assert len(tap.take()) == 3
    assert (tap.seen, tap.kept) == (106, APPROVED_PER_S_MAX + NOTABLE_PER_S_MAX + 3)


def test_nothing_is_kept_without_end_when_nobody_takes_it() -> None:
    clock = Clock()
    tap = Tap(clock)
    for _ in range(WAITING_MAX):
        clock.now_s += 1
        tap.offer([result(Outcome.DECLINE)] * NOTABLE_PER_S_MAX)
    assert len(tap.take()) == WAITING_MAX


def test_scores_are_counted_by_route_and_what_was_not_decided_is_not() -> None:
    tap = Tap(Clock())
    duplicate = Result(make_job(), Verdict.DUPLICATE, answer=make_answer())
    tap.offer([result(score=0), result(score=99), result(score=100), result(score=1000, route="challenger"), duplicate, None])
    assert (tap.scores["champion"].count, tap.scores["champion"].bins[:2]) == (3, [2, 1])
    assert (tap.scores["challenger"].count, tap.scores["challenger"].bins[-1]) == (1, 1)
    assert tap.seen == 4


def metric(metrics: Metrics, name: str) -> Any:
    return metrics.registry.get_sample_value(name)


async def test_one_viewer_too_many_is_refused_and_counted() -> None:
    metrics = Metrics()
    viewers = Viewers(2, metrics)
    first, second = viewers.join(), viewers.join()
    assert first is not None and second is not None
    assert viewers.join() is None
    assert metric(metrics, "fraudgate_console_viewers") == 2
    assert metric(metrics, "fraudgate_console_refused_total") == 1
    viewers.leave(first)
    viewers.leave(first)
    assert metric(metrics, "fraudgate_console_viewers") == 1
    assert viewers.join() is not None


async def test_who_does_not_read_is_dropped_and_who_reads_is_not() -> None:
    metrics = Metrics()
    viewers = Viewers(2, metrics)
    slow, quick = viewers.join(), viewers.join()
    assert slow is not None and quick is not None
    for i in range(FRAMES_WAITING_MAX + 1):
        viewers.send(b"%d" % i)
        assert await quick.frames.get() == b"%d" % i
    assert slow.dropped and not quick.dropped
    # What it had not read is given up with it: nothing of a dropped viewer stays in memory.
    assert await slow.frames.get() == END and slow.frames.empty()
    assert metric(metrics, "fraudgate_console_dropped_total") == 1
    assert len(viewers) == 1


async def test_a_gateway_that_leaves_ends_every_stream_and_begins_none() -> None:
    viewers = Viewers(2, Metrics())
    viewer = viewers.join()
    assert viewer is not None
    for _ in range(FRAMES_WAITING_MAX):
        viewers.send(b"x")
    viewers.close()
    async with asyncio.timeout(1):
        assert await viewer.frames.get() == END
    assert viewers.join() is None
