from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from gateway.contracts.decision import Outcome
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.layout import CLAIM_ALONE_MS, CLAIM_DEAD_MS, CLAIM_FREE_MS, CLAIM_PATIENCE_MS
from gateway.contracts.reasons import REASONS_MAX
from gateway.explanations.reasons import ASKED_ROWS_MAX
from gateway.kafka.avro import receipt_of
from gateway.metrics import Metrics
from gateway.models.model import ModelSlot, load_model
from gateway.policy import load_policy
from gateway.policy.slot import PolicySlot
from gateway.redis.store import Observation
from gateway.redis.unobserved import Unobserved
from gateway.scoring import scorer
from gateway.scoring.job import Job, Result, Verdict
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.scorer import Scorer
from tests.factories_model import MERCHANTS, make_features, make_model_dir, risky_row, safe_row
from tests.unit.gateway.factories import NOW_MS, StubStore, make_answer, make_job, make_observation, make_transaction, write_model

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> ModelSlot:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    made = ModelSlot(folder)
    made.model = load_model(folder, "champion")
    assert made.model is not None
    return made


@pytest.fixture
def no_model(tmp_path: Path) -> ModelSlot:
    return ModelSlot(tmp_path)


def make_scorer(
    store: StubStore,
    models: ModelSlot,
    clock_s: float = 0.0,
    unobserved: Unobserved | None = None,
    clock: Callable[[], float] | None = None,
) -> Scorer:
    return Scorer(
        store,  # type: ignore[arg-type]
        models,
        PolicySlot(load_policy("")),
        Metrics(),
        RecentDecisions(600, clock_s=lambda: clock_s),
        Unobserved(store, Metrics()) if unobserved is None else unobserved,  # type: ignore[arg-type]
        feature_budget_ms=40,
        code_version="test",
        now_ms=lambda: NOW_MS,
        clock_s=(lambda: clock_s) if clock is None else clock,
    )


def settled_by(before: bytes) -> Observation:
    found = make_observation(1)
    found.settled = [before]
    return found


async def test_a_decision_has_an_answer_and_a_receipt_with_the_models_inputs(slot: ModelSlot) -> None:
    job = make_job(offset=7)
    observation = make_observation(1, card_count_5m=2)
    [result] = await make_scorer(StubStore(observation), slot).decide([job])
    assert result.verdict is Verdict.DECIDED
    assert result.answer is not None
    assert result.receipt is not None
    assert result.answer.degraded == []
    receipt = receipt_of(result.receipt)
    assert receipt.transaction == job.transaction
    assert (receipt.source_partition, receipt.source_offset) == (0, 7)
    assert np.array_equal(np.array(receipt.features, np.float32), observation.matrix[0], equal_nan=True)
    assert slot.model is not None
    assert receipt.model_digest == slot.model.digest
    assert receipt.probability is not None
    assert receipt.probability == pytest.approx(slot.model.probability(observation.matrix)[0])
    assert receipt.risk_score == result.answer.risk_score == int(receipt.probability * 1000 + 0.5)


@pytest.mark.parametrize(("ready", "observation"), [(True, None), (False, None)])
async def test_redis_out_of_reach_costs_the_entity_features_alone(
    slot: ModelSlot, ready: bool, observation: Observation | None
) -> None:
    store = StubStore(observation, ready)
    [result] = await make_scorer(store, slot).decide([make_job()])
    assert result.answer is not None
    assert result.answer.degraded == ["request_only"]
    assert result.answer.probability is not None
    assert len(store.timeouts_s) == ready


async def test_stale_features_are_flagged_by_transaction(slot: ModelSlot) -> None:
    observation = make_observation(2)
    observation.stale = np.array([False, True])
    results = await make_scorer(StubStore(observation), slot).decide([make_job(make_transaction(i)) for i in ("a", "b")])
    assert [r.answer.degraded for r in results if r.answer] == [[], ["stale_features"]]


async def test_without_a_model_the_rules_decide(no_model: ModelSlot) -> None:
    [result] = await make_scorer(StubStore(make_observation(1, card_count_5m=50)), no_model).decide([make_job()])
    assert result.answer is not None
    assert result.answer.degraded == ["rules_only"]
    assert result.answer.decision is Outcome.DECLINE
    assert (result.answer.probability, result.answer.model) == (None, None)


async def test_without_model_and_features_the_band_of_the_amount_decides(no_model: ModelSlot) -> None:
    [result] = await make_scorer(StubStore(None), no_model).decide([make_job(make_transaction(amount_minor=200_000))])
    assert result.answer is not None
    assert result.answer.degraded == ["static_policy"]
    assert result.answer.decision is Outcome.REVIEW
    assert [r.code for r in result.answer.reasons] == ["NO_MODEL"]


async def test_the_time_for_redis_shrinks_with_the_deadline(slot: ModelSlot) -> None:
    store = StubStore(make_observation(1))
    scorer = make_scorer(store, slot, clock_s=100.0)
    await scorer.decide([make_job(make_transaction("a"), deadline_s=100.080)])
    await scorer.decide([make_job(make_transaction("b"), deadline_s=100.030)])
    assert store.timeouts_s == pytest.approx([0.040, 0.020])
    [late] = await scorer.decide([make_job(make_transaction("c"), deadline_s=100.007)])
    assert len(store.timeouts_s) == 2
    assert late.answer is not None
    assert late.answer.degraded == ["request_only"]
    [too_late] = await scorer.decide([make_job(make_transaction("d"), deadline_s=100.002)])
    assert too_late.answer is not None
    assert too_late.answer.degraded == ["static_policy"]


async def test_a_retry_gets_the_recorded_answer_and_no_receipt(slot: ModelSlot) -> None:
    job = make_job()
    before = job.claim + msgspec.msgpack.encode(make_answer())
    store = StubStore(settled_by(before))
    [result] = await make_scorer(store, slot).decide([job])
    assert (result.verdict, result.answer, result.receipt) == (Verdict.DUPLICATE, make_answer(), None)
    assert store.recorded == []


# A clock that stands at the deadline's beginning until Redis has answered, and then `late_ms` further.
def clock_of(late_ms: float) -> Callable[[], float]:
    times = iter([100.0, 100.0])
    return lambda: next(times, 100.0 + late_ms / 1000)


async def test_a_gateway_that_was_halted_tells_what_another_decided_and_no_more(slot: ModelSlot) -> None:
    job = make_job(deadline_s=100.080)
    store = StubStore(make_observation(1))
    store.answered = make_job(process=2).claim + msgspec.msgpack.encode(make_answer())
    scorer = make_scorer(store, slot, clock=clock_of(15_000))
    [result] = await scorer.decide([job])
    assert (result.verdict, result.answer, result.receipt) == (Verdict.DUPLICATE, make_answer(), None)
    assert (store.asked, store.recorded) == ([job], [])
    # A retry that comes to this gateway is told the same: it doesn't remember its own.
    retry = make_job(deadline_s=200.0)
    store.observation = settled_by(store.answered)
    [again] = await scorer.decide([retry])
    assert again.answer == make_answer()


@pytest.mark.parametrize(("late_ms", "asks"), [(CLAIM_ALONE_MS - 1, False), (CLAIM_ALONE_MS + 1, True)])
async def test_only_who_is_late_asks_whether_another_was_faster(slot: ModelSlot, late_ms: int, asks: bool) -> None:
    job = make_job(deadline_s=100.080)
    store = StubStore(make_observation(1))
    [result] = await make_scorer(store, slot, clock=clock_of(late_ms)).decide([job])
    assert result.verdict is Verdict.DECIDED and result.receipt is not None
    # Who asks stores its answer by that.
    assert (store.asked, store.recorded) == (([job], []) if asks else ([], [job]))


async def test_without_redis_nobody_waits_for_it_once_more_before_the_deadline(slot: ModelSlot) -> None:
    for late_ms, asked in ((60, 0), (90, 1)):
        store = StubStore(None)
        await make_scorer(store, slot, clock=clock_of(late_ms)).decide([make_job(deadline_s=100.080)])
        assert len(store.asked) == asked


class Claimed(StubStore):
    """As in Redis, which holds the claim of `first`: any other is settled by it, under that claim it may be decided."""

    def __init__(self, first: Job) -> None:
        super().__init__(None)
        self._first = first

    async def observe(self, batch, requests, timeout_s, update=True):  # type: ignore[no-untyped-def]
        held = batch[0].held_claim
        self.observation = make_observation(1) if held == self._first.claim else settled_by(self._first.claim)
        return await super().observe(batch, requests, timeout_s, update)


async def test_a_claim_without_an_answer_is_free_after_a_while_and_then_the_first_answer_stands(slot: ModelSlot) -> None:
    first = make_job(process=2, claimed_ms=NOW_MS - CLAIM_FREE_MS)

    job, store = make_job(), Claimed(first)
    [taken] = await make_scorer(store, slot).decide([job])
    assert (taken.verdict, store.asked, store.recorded) == (Verdict.DECIDED, [job], [])
    store.answered = first.claim + msgspec.msgpack.encode(make_answer())
    [slower] = await make_scorer(store, slot).decide([make_job()])
    assert (slower.verdict, slower.answer, slower.receipt) == (Verdict.DUPLICATE, make_answer(), None)


@pytest.mark.parametrize(
    ("claimed_ago_ms", "left_ms", "waited", "waits"),
    [(65, 50, False, True), (65, 50, True, False), (65, 39, False, False), (CLAIM_DEAD_MS, 50, False, False)],
)
async def test_a_claim_that_is_free_is_left_to_it_once_more_by_who_has_the_time(
    slot: ModelSlot, claimed_ago_ms: int, left_ms: int, waited: bool, waits: bool
) -> None:
    first = make_job(process=2, claimed_ms=NOW_MS - claimed_ago_ms)

    job = make_job(deadline_s=100.0 + left_ms / 1000)
    job.patient = not waited
    [result] = await make_scorer(Claimed(first), slot, clock_s=100.0).decide([job])
    assert result.verdict is (Verdict.IN_PROGRESS if waits else Verdict.DECIDED)
    assert result.free_in_s == (CLAIM_PATIENCE_MS / 1000 if waits else None)


@pytest.mark.parametrize(("claimed_ago_ms", "free_in_ms"), [(0, 45), (44, 1), (-5_000, 45)])
async def test_a_young_claim_of_another_process_is_left_to_it(slot: ModelSlot, claimed_ago_ms: int, free_in_ms: int) -> None:
    before = make_job(process=2, claimed_ms=NOW_MS - claimed_ago_ms).claim
    store = StubStore(settled_by(before))
    [result] = await make_scorer(store, slot).decide([make_job()])
    assert (result.verdict, result.answer) == (Verdict.IN_PROGRESS, None)
    assert result.free_in_s == pytest.approx(free_in_ms / 1000)


async def test_another_body_is_a_conflict(slot: ModelSlot) -> None:
    before = make_job(make_transaction(amount_minor=1)).claim
    [result] = await make_scorer(StubStore(settled_by(before)), slot).decide([make_job()])
    assert (result.verdict, result.answer) == (Verdict.CONFLICT, None)


async def test_http_is_told_that_the_kafka_door_is_deciding(slot: ModelSlot) -> None:
    [result] = await make_scorer(StubStore(settled_by(make_job(offset=3).claim)), slot).decide([make_job()])
    assert result.verdict is Verdict.IN_PROGRESS


async def test_a_second_record_of_kafka_is_left_to_the_first(slot: ModelSlot) -> None:
    [result] = await make_scorer(StubStore(settled_by(make_job(offset=3).claim)), slot).decide([make_job(offset=4)])
    assert (result.verdict, result.receipt) == (Verdict.DUPLICATE, None)


async def test_kafka_leaves_to_http_what_it_is_deciding_and_takes_over_what_it_never_answered(slot: ModelSlot) -> None:
    http = make_job(claimed_ms=NOW_MS - 20)

    class OnceSettled(StubStore):
        async def observe(self, batch, request, timeout_s, update=True):  # type: ignore[no-untyped-def]
            found = await super().observe(batch, request, timeout_s, update)
            self.observation = make_observation(1)
            self.claims = [job.held_claim for job in batch]
            return found

    scorer = make_scorer(StubStore(settled_by(http.claim)), slot)
    scorer.deciding.add("t1")
    [left] = await scorer.decide([make_job(offset=4)])
    assert left.verdict is Verdict.DUPLICATE

    store = OnceSettled(settled_by(http.claim))
    job = make_job(offset=4)
    [taken] = await make_scorer(store, slot).decide([job])
    assert taken.verdict is Verdict.DECIDED
    assert (store.claims, store.asked) == ([http.claim], [job])
    # Under its own claim, so that it is decided again when it is delivered again.
    assert job.claim == make_job(offset=4).claim


async def test_what_was_decided_without_redis_is_kept_to_be_observed(slot: ModelSlot) -> None:
    silent = StubStore(None)
    unobserved = Unobserved(silent, Metrics())  # type: ignore[arg-type]
    await make_scorer(silent, slot, unobserved=unobserved).decide([make_job()])
    assert len(unobserved) == 1
    await make_scorer(StubStore(make_observation(1)), slot, unobserved=unobserved).decide([make_job()])
    assert len(unobserved) == 1
    full = make_observation(1)
    full.written = False
    await make_scorer(StubStore(full), slot, unobserved=unobserved).decide([make_job()])
    assert len(unobserved) == 2


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> ModelSlot:
    folder = tmp_path_factory.mktemp("explained")
    make_model_dir(folder)
    made = ModelSlot(folder)
    made.model = load_model(folder, "champion")
    assert made.model is not None
    assert made.model.explainer is not None
    return made


@pytest.fixture
def time_for_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "STREAM_REASONS_BUDGET_MS", 60_000)


def observed(*rows: npt.NDArray[np.float32]) -> Observation:
    found = make_observation(len(rows))
    found.matrix = np.concatenate(rows)
    return found


def jobs_of(*amounts: int) -> list[Job]:
    return [make_job(make_transaction(f"t{i}", amount_minor=a), offset=i) for i, a in enumerate(amounts)]


def reasons_of(results: list[Result]) -> list[list[str]]:
    return [[] if r.answer is None else [reason.code for reason in r.answer.reasons] for r in results]


@pytest.mark.usefixtures("time_for_reasons")
async def test_a_score_that_decides_has_the_models_reasons_in_answer_and_receipt(explained: ModelSlot) -> None:
    store = StubStore(observed(risky_row(), safe_row()))
    results = await make_scorer(store, explained).decide(jobs_of(200_000, 2_000))
    risky, safe = results
    assert risky.answer is not None
    assert safe.answer is not None
    assert (risky.answer.decision, safe.answer.decision) == (Outcome.DECLINE, Outcome.APPROVE)
    codes = reasons_of(results)[0]
    assert set(codes[:2]) == {"AMOUNT_HIGH", "CARD_MANY_MERCHANTS"}
    assert len(codes) <= REASONS_MAX
    assert all(r.text and r.cardholder_text for r in risky.answer.reasons)
    assert safe.answer.reasons == []
    assert risky.receipt is not None
    assert receipt_of(risky.receipt).reasons == codes


@pytest.mark.usefixtures("time_for_reasons")
async def test_a_rules_reason_comes_before_the_models(explained: ModelSlot) -> None:
    row = risky_row()
    row[0, FEATURE_INDEX["device_distinct_cards_1h"]] = 7
    row[0, FEATURE_INDEX["card_count_5m"]] = 0
    [codes] = reasons_of(await make_scorer(StubStore(observed(row)), explained).decide(jobs_of(200_000)))
    assert codes[0] == "DEVICE_MANY_CARDS"
    assert {"AMOUNT_HIGH", "CARD_MANY_MERCHANTS"} <= set(codes)
    assert "MODEL_SCORE_HIGH" not in codes


@pytest.mark.usefixtures("time_for_reasons")
async def test_who_asks_gets_the_reasons_of_an_approval(explained: ModelSlot) -> None:
    row = safe_row()
    row[0, MERCHANTS] = 8
    jobs = jobs_of(*[2_000] * (ASKED_ROWS_MAX + 2))
    for job in jobs[1:]:
        job.explain = True
    results = await make_scorer(StubStore(observed(*[row] * len(jobs))), explained).decide(jobs)
    assert {r.answer.decision for r in results if r.answer} == {Outcome.APPROVE}
    codes = reasons_of(results)
    assert codes[0] == []
    assert codes[1]
    # Within bounds: who asks last goes without.
    assert codes[1 : ASKED_ROWS_MAX + 1] == [codes[1]] * ASKED_ROWS_MAX
    assert codes[-1] == []


async def test_late_reasons_cost_neither_the_decision_nor_the_answer(explained: ModelSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "STREAM_REASONS_BUDGET_MS", 0)
    results = await make_scorer(StubStore(observed(risky_row())), explained).decide(jobs_of(200_000))
    assert reasons_of(results) == [["MODEL_SCORE_HIGH"]]


async def test_a_model_without_explanation_has_the_general_reason(slot: ModelSlot) -> None:
    assert slot.model is not None
    row = risky_row()
    p = slot.model.probability(np.concatenate([row, safe_row(), make_features(200)]))
    risky = np.concatenate([row, safe_row(), make_features(200)])[[int(np.argmax(p))]]
    assert p.max() > 0.3
    results = await make_scorer(StubStore(observed(risky)), slot).decide(jobs_of(2_000_000))
    assert "MODEL_SCORE_HIGH" in reasons_of(results)[0]


@pytest.mark.usefixtures("time_for_reasons")
async def test_without_a_claim_in_redis_nothing_waits_for_reasons(explained: ModelSlot) -> None:
    unclaimed = observed(risky_row())
    unclaimed.written = False
    deciding = make_scorer(StubStore(unclaimed), explained).decide(jobs_of(200_000))
    # Not even one turn of the loop: the stub of Redis doesn't wait either.
    with pytest.raises(StopIteration) as done:
        deciding.send(None)
    assert reasons_of(done.value.value) == [["MODEL_SCORE_HIGH"]]
