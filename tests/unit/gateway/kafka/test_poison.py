"""A batch never fails for one row; what fails for every row isn't taken for poison."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from gateway.kafka.poison import ROWS_MAX, WINDOW_S, PoisonFilter
from gateway.scoring.job import Job, Result, Verdict
from tests.unit.gateway.factories import make_job, make_transaction


def make_jobs(count: int) -> list[Job]:
    return [make_job(make_transaction(f"t{i}"), offset=i) for i in range(count)]


def failing_for(is_bad: Callable[[str], bool], calls: list[int]) -> Callable[[Sequence[Job]], object]:
    async def decide(jobs: Sequence[Job]) -> list[Result]:
        calls.append(len(jobs))
        if any(is_bad(job.transaction.transaction_id) for job in jobs):
            raise ArithmeticError
        return [Result(job, Verdict.DECIDED) for job in jobs]

    return decide


def test_the_one_row_is_left_out_and_its_neighbours_are_decided() -> None:
    jobs, calls = make_jobs(256), list[int]()
    results = asyncio.run(PoisonFilter(failing_for(lambda i: i == "t77", calls)).decide(jobs))  # type: ignore[arg-type]
    assert [i for i, result in enumerate(results) if result is None] == [77]
    assert all(result is None or result.job is job for job, result in zip(jobs, results, strict=True))
    assert len(calls) == 17


def test_as_many_as_the_limit_are_given_up_and_one_more_is_a_failure_of_the_batch() -> None:
    bad = {f"t{i}" for i in range(ROWS_MAX)}
    results = asyncio.run(PoisonFilter(failing_for(lambda i: i in bad, [])).decide(make_jobs(20)))  # type: ignore[arg-type]
    assert results.count(None) == ROWS_MAX
    bad.add(f"t{ROWS_MAX}")
    with pytest.raises(ArithmeticError):
        asyncio.run(PoisonFilter(failing_for(lambda i: i in bad, [])).decide(make_jobs(20)))  # type: ignore[arg-type]


def test_a_scorer_that_fails_for_all_does_not_empty_the_topic_into_quarantine_one_by_one() -> None:
    now_s = [0.0]
    poison = PoisonFilter(failing_for(lambda _: True, []), clock_s=lambda: now_s[0])  # type: ignore[arg-type]
    for job in make_jobs(ROWS_MAX):
        assert asyncio.run(poison.decide([job])) == [None]
    with pytest.raises(ArithmeticError):
        asyncio.run(poison.decide(make_jobs(1)))
    now_s[0] = WINDOW_S
    assert asyncio.run(poison.decide(make_jobs(1))) == [None]
