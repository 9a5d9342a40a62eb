"""Retries while Redis can't tell: the gateway's own memory of what it decided lately."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.app import Gateway
from gateway.contracts.settings import Settings
from gateway.models.model import ModelSlot
from gateway.scoring.job import Verdict
from gateway.scoring.recent import RecentDecisions
from tests.unit.gateway.factories import StubStore, make_job, make_observation, make_transaction
from tests.unit.gateway.scoring.test_scorer import make_scorer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("first_had_redis", [True, False])
async def test_a_retry_while_redis_is_out_of_reach_gets_the_first_answer_and_no_second_receipt(
    tmp_path: Path, first_had_redis: bool
) -> None:
    store = StubStore(make_observation(1) if first_had_redis else None)
    scorer = make_scorer(store, ModelSlot(tmp_path))
    [first] = await scorer.decide([make_job()])
    store.observation = None
    [over_http] = await scorer.decide([make_job()])
    [over_kafka] = await scorer.decide([make_job(offset=3)])
    assert first.verdict is Verdict.DECIDED
    assert over_http.verdict is over_kafka.verdict is Verdict.DUPLICATE
    assert over_http.answer == first.answer
    assert over_http.receipt is over_kafka.receipt is None


async def test_another_body_under_the_same_id_is_a_conflict_while_redis_is_out_of_reach(tmp_path: Path) -> None:
    scorer = make_scorer(StubStore(None), ModelSlot(tmp_path))
    await scorer.decide([make_job()])
    [other] = await scorer.decide([make_job(make_transaction(amount_minor=1))])
    assert other.verdict is Verdict.CONFLICT


async def test_a_batch_without_redis_that_holds_a_transaction_twice_decides_it_once(tmp_path: Path) -> None:
    scorer = make_scorer(StubStore(None), ModelSlot(tmp_path))
    other = make_job(make_transaction(amount_minor=1), offset=5)
    results = await scorer.decide([make_job(offset=3), make_job(offset=4), other])
    assert [r.verdict for r in results] == [Verdict.DECIDED, Verdict.DUPLICATE, Verdict.CONFLICT]


async def test_the_doors_of_a_gateway_know_what_either_decided(tmp_path: Path) -> None:
    http_scorer, kafka_scorer = Gateway(Settings(home=str(tmp_path))).scorers
    [over_http] = await http_scorer.decide([make_job()])
    [over_kafka] = await kafka_scorer.decide([make_job(offset=3)])
    assert (over_http.verdict, over_kafka.verdict) == (Verdict.DECIDED, Verdict.DUPLICATE)


async def test_a_redelivery_from_the_same_position_is_decided_again(tmp_path: Path) -> None:
    scorer = make_scorer(StubStore(None), ModelSlot(tmp_path))
    for _ in range(2):
        [result] = await scorer.decide([make_job(offset=3)])
        assert result.verdict is Verdict.DECIDED


def test_the_memory_forgets_the_oldest_beyond_its_bound() -> None:
    recent = RecentDecisions(600, decisions_max=2)
    jobs = [make_job(make_transaction(f"t{n}")) for n in range(3)]
    for job in jobs:
        recent.add([(job, job.claim + b"answer")])
    assert len(recent) == 2
    assert recent.settles(jobs[0]) is None
    assert recent.settles(jobs[2]) == jobs[2].claim + b"answer"


def test_the_memory_ends_with_the_idempotency_window() -> None:
    now_s = 100.0
    recent = RecentDecisions(600, clock_s=lambda: now_s)
    job = make_job()
    recent.add([(job, job.claim + b"answer")])
    now_s = 699.9
    assert recent.settles(job) is not None
    now_s = 700.0
    assert recent.settles(job) is None
