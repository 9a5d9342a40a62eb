"""Exploration: who may be explored, how often, with which propensity, and never beyond the day's cap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.contracts.decision import Receipt
from gateway.contracts.routing import EXPLORE_SALT, Routing, point_of
from gateway.kafka.avro import receipt_of
from gateway.metrics import Metrics
from gateway.models.explore import DAY_MS, Explorer, LossCap
from gateway.models.model import ModelSlot
from gateway.policy import load_policy
from gateway.policy.slot import PolicySlot
from gateway.redis.link import RedisUnavailableError
from gateway.redis.sharing import SharedCap
from gateway.redis.unobserved import Unobserved
from gateway.scoring.job import Job, Result
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.scorer import Scorer
from tests.unit.gateway.factories import NOW_MS, StubStore, make_job, make_observation, make_transaction, write_model

pytestmark = pytest.mark.anyio
AMOUNT = 40_000
ON = Routing(challenger_share=0.0, explore_share=0.2, explore_amount_max_minor=50_000, explore_loss_max_minor_per_day=100_000_000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model declines what is above 10,000 minor units."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    return folder


class Harness:
    def __init__(self, models: Path, routing: Routing, cap: LossCap | None = None) -> None:
        self.slot = ModelSlot(models, routing=routing)
        self.cap = LossCap(lambda: 0.0) if cap is None else cap
        self.metrics = Metrics()
        self.now_ms = NOW_MS

    async def decide(self, jobs: list[Job], **features: float) -> tuple[list[Result], list[Receipt]]:
        await self.slot.refresh()
        observation = make_observation(len(jobs), **features)
        observation.matrix[:, 0] = [job.transaction.amount_minor for job in jobs]
        store: Any = StubStore(observation)
        scorer = Scorer(
            store,
            self.slot,
            PolicySlot(load_policy("")),
            self.metrics,
            RecentDecisions(600, clock_s=lambda: 0.0),
            Unobserved(store, Metrics()),
            feature_budget_ms=40,
            code_version="test",
            explorer=Explorer(self.cap, self.metrics, lambda: self.now_ms),
            now_ms=lambda: self.now_ms,
            clock_s=lambda: 0.0,
        )
        results = await scorer.decide(jobs)
        return results, [receipt_of(r.receipt) for r in results if r.receipt is not None]


def make_jobs(n: int, amount: int = AMOUNT, name: str = "x") -> list[Job]:
    return [make_job(make_transaction(f"{name}{i}", card_id=f"card-{i}", amount_minor=amount)) for i in range(n)]


async def test_the_drawn_are_approved_and_each_receipt_has_the_probability_of_what_was_done(models: Path) -> None:
    results, receipts = await Harness(models, ON).decide(make_jobs(400))
    drawn = [point_of(f"x{i}".encode(), EXPLORE_SALT) < 0.2 for i in range(400)]
    assert 40 < sum(drawn) < 120
    for is_drawn, result, receipt in zip(drawn, results, receipts, strict=True):
        assert receipt.policy_decision == "decline"
        assert (receipt.decision, receipt.propensity) == (("approve", 0.2) if is_drawn else ("decline", 0.8))
        assert result.answer is not None
        assert result.answer.decision == receipt.decision
        assert [r.code for r in result.answer.reasons] == receipt.reasons == ([] if is_drawn else ["MODEL_SCORE_HIGH"])
        assert receipt.probability is not None
        assert receipt.probability > 0.8


async def test_it_is_off_unless_somebody_turns_it_on(models: Path) -> None:
    _, receipts = await Harness(models, Routing()).decide(make_jobs(200))
    assert {(r.decision, r.policy_decision, r.propensity) for r in receipts} == {("decline", "decline", 1.0)}


async def test_what_is_above_the_amount_is_never_explored(models: Path) -> None:
    for amount, expected in ((50_000, {0.2, 0.8}), (50_001, {1.0})):
        _, receipts = await Harness(models, ON).decide(make_jobs(200, amount))
        assert {r.propensity for r in receipts} == expected


async def test_what_a_rule_declines_or_asks_to_review_is_never_explored(models: Path) -> None:
    for feature in ({"card_count_5m": 50}, {"card_count_1h": 50, "card_distinct_merchants_1h": 9}):
        _, receipts = await Harness(models, ON).decide(make_jobs(200), **feature)
        assert all(r.rule_hits for r in receipts)
        assert {(r.decision, r.propensity) for r in receipts} == {("decline", 1.0)}


async def test_what_the_policy_does_not_decline_is_left_alone(models: Path) -> None:
    _, receipts = await Harness(models, ON).decide(make_jobs(100, 1_000))
    assert {(r.decision, r.policy_decision, r.propensity) for r in receipts} == {("approve", "approve", 1.0)}


async def test_the_days_cap_is_never_exceeded_and_what_it_holds_back_has_propensity_one(models: Path) -> None:
    cap_minor = 5 * AMOUNT + AMOUNT // 2
    harness = Harness(models, Routing(**{**_fields(ON), "explore_loss_max_minor_per_day": cap_minor}))
    receipts = []
    for batch in range(8):
        receipts += (await harness.decide(make_jobs(50, name=f"b{batch}-")))[1]
    explored = [r for r in receipts if r.decision == "approve"]
    assert len(explored) == 5
    assert harness.cap.spent_minor == 5 * AMOUNT <= cap_minor
    last = max(i for i, r in enumerate(receipts) if r.decision == "approve")
    assert {r.propensity for r in receipts[:last] if r.decision == "decline"} == {0.8}
    assert {(r.decision, r.propensity) for r in receipts[last + 1 :]} == {("decline", 1.0)}
    harness.now_ms += DAY_MS
    _, tomorrow = await harness.decide(make_jobs(50, name="tomorrow"))
    assert {r.propensity for r in tomorrow} >= {0.8}


def _fields(routing: Routing) -> dict[str, Any]:
    return {name: getattr(routing, name) for name in routing.__struct_fields__}


async def test_the_same_payments_are_drawn_again(models: Path) -> None:
    first = await Harness(models, ON).decide(make_jobs(100))
    again = await Harness(models, ON).decide(make_jobs(100))
    assert [r.decision for r in first[1]] == [r.decision for r in again[1]]


async def test_an_estimate_weighted_by_propensity_finds_what_the_declined_would_have_been(models: Path) -> None:
    _, receipts = await Harness(models, ON).decide(make_jobs(3000))
    fraud = np.array([i % 4 == 0 for i in range(3000)])
    seen = np.array([r.decision == "approve" for r in receipts])
    weight = np.array([1 / r.propensity for r in receipts])
    estimate = float((fraud * weight)[seen].sum() / weight[seen].sum())
    assert abs(estimate - 0.25) < 4 * np.sqrt(0.25 * 0.75 / seen.sum())


class Counter:
    """Redis' INCRBY, for several gateways; `down` as when it doesn't answer."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.down = False

    async def __call__(self, key: str, command: Any, _timeout_s: float) -> int:
        if self.down:
            raise RedisUnavailableError("down")
        if command[0] == "INCRBY":
            self.values[key] = self.values.get(key, 0) + int(command[2])
        return self.values[key]


async def test_gateways_share_the_cap_and_stop_when_they_can_not_ask(models: Path) -> None:
    counter, clock_s = Counter(), [0.0]
    routing = Routing(**{**_fields(ON), "explore_share": 0.5, "explore_loss_max_minor_per_day": 20 * AMOUNT})
    gateways = []
    for _ in range(2):
        harness = Harness(models, routing, LossCap(lambda: clock_s[0], stale_s=10.0))
        gateways.append((harness, SharedCap(harness.cap, harness.slot, counter, harness.metrics, lambda: NOW_MS)))
    _, untold = await gateways[0][0].decide(make_jobs(50, name="untold"))
    assert {r.propensity for r in untold} == {1.0}, "before Redis said what the others spent nothing is explored"
    for turn in range(20):
        for i, (harness, shared) in enumerate(gateways):
            await shared.tick()
            await harness.decide(make_jobs(5, name=f"{turn}-{i}-"))
    for _, shared in gateways:
        await shared.tick()
    total = counter.values[f"fraudgate:explored:{NOW_MS // DAY_MS}"]
    # Each may spend what the other spends between two updates: five payments here.
    assert 20 * AMOUNT - AMOUNT < total <= 20 * AMOUNT + 5 * AMOUNT
    counter.down = True
    await gateways[0][1].tick()
    clock_s[0] = 11.0
    counter.values.clear()
    _, alone = await gateways[0][0].decide(make_jobs(50, name="alone"))
    assert {r.propensity for r in alone} == {1.0}
    counter.down = False
    await gateways[0][1].tick()
    assert gateways[0][0].cap.spent_minor >= 20 * AMOUNT - AMOUNT, "a Redis that forgot gives no money back"
