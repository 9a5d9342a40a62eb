"""Champion and challenger share a batch: by card, in at most two calls, and the challenger never costs anybody an answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from gateway.contracts.decision import Receipt, RoutedBy
from gateway.contracts.model_meta import MODEL_FILE, read_manifest, write_manifest
from gateway.contracts.routing import (
    GUARD_FILE,
    ROUTING_FILE,
    Routing,
    Verdict,
    clear_guard,
    point_of,
    route_salt,
    take_out,
    write_routing,
)
from gateway.kafka.avro import receipt_of
from gateway.models.model import ORT_ERRORS, Live, Model, ModelSlot
from gateway.scoring.job import Job, Result
from gateway.scoring.scorer import Scorer
from tests.unit.gateway.factories import StubStore, make_job, make_observation, make_transaction
from tests.unit.gateway.scoring.test_scorer import make_scorer

pytestmark = pytest.mark.anyio
CARDS = 200


@pytest.fixture
def models(trained: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(trained, tmp_path / "models"))


def make_jobs(n: int = CARDS) -> list[Job]:
    return [make_job(make_transaction(f"t{i}", card_id=f"card-{i}", amount_minor=50 * (i + 1) ** 2)) for i in range(n)]


async def decide(scorer: Scorer, jobs: list[Job]) -> tuple[list[Result], list[Receipt]]:
    results = await scorer.decide(jobs)
    return results, [receipt_of(r.receipt) for r in results if r.receipt is not None]


def observation_of(jobs: list[Job]) -> Any:
    found = make_observation(len(jobs))
    found.matrix[:, 0] = [job.transaction.amount_minor for job in jobs]
    return found


async def test_each_card_goes_where_its_hash_says_and_the_receipt_has_the_model_that_scored_it(models: Path) -> None:
    slot = ModelSlot(models, routing=Routing(challenger_share=0.3))
    await slot.refresh()
    live, jobs = slot.live, make_jobs()
    observation = observation_of(jobs)
    results, receipts = await decide(make_scorer(StubStore(observation), slot), jobs)
    assert live.champion is not None
    assert live.challenger is not None
    salt = route_salt(live.challenger.digest)
    by = {"champion": live.champion, "challenger": live.challenger}
    expected = ["challenger" if point_of(job.card_id, salt) < 0.3 else "champion" for job in jobs]
    assert 0.2 < expected.count("challenger") / CARDS < 0.4
    for i, (result, receipt) in enumerate(zip(results, receipts, strict=True)):
        model = by[expected[i]]
        assert (receipt.route, receipt.routed_by) == (expected[i], "share")
        assert (receipt.model_version, receipt.model_digest) == (model.ref.version, model.digest)
        assert receipt.probability == model.probability(observation.matrix[i : i + 1])[0]
        assert result.answer is not None
        assert result.answer.model == model.ref
        assert result.answer.decision == receipt.decision == receipt.policy_decision
        assert receipt.propensity == 1.0


@pytest.mark.parametrize(("share", "calls"), [(0.0, (1, 0)), (0.5, (1, 1)), (1.0, (0, 1))])
async def test_a_batch_costs_at_most_one_call_a_model(
    models: Path, monkeypatch: pytest.MonkeyPatch, share: float, calls: tuple[int, int]
) -> None:
    slot = ModelSlot(models, routing=Routing(challenger_share=share))
    await slot.refresh()
    made: list[str] = []
    probability = Model.probability

    def counted(self: Model, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        made.append(self.ref.route)
        return probability(self, matrix)

    monkeypatch.setattr(Model, "probability", counted)
    jobs = make_jobs()
    _, receipts = await decide(make_scorer(StubStore(observation_of(jobs)), slot), jobs)
    assert (made.count("champion"), made.count("challenger")) == calls
    assert {r.routed_by for r in receipts} == {"share"}


async def test_without_a_challenger_all_are_the_champions(models: Path) -> None:
    manifest = read_manifest(models)
    write_manifest(models, msgspec.structs.replace(manifest, routes={"champion": manifest.routes["champion"]}))
    slot = ModelSlot(models)
    await slot.refresh()
    jobs = make_jobs(8)
    _, receipts = await decide(make_scorer(StubStore(observation_of(jobs)), slot), jobs)
    assert {(r.route, r.routed_by, r.propensity) for r in receipts} == {("champion", "only", 1.0)}


async def test_a_refused_challenger_leaves_the_champion_with_all_traffic(models: Path) -> None:
    (models / "fraudgate-2" / MODEL_FILE).write_bytes(b"another file")
    refusals: list[None] = []
    slot = ModelSlot(models, on_refused=lambda: refusals.append(None), routing=Routing(challenger_share=1.0))
    await slot.refresh()
    assert slot.live.champion is not None
    assert (slot.live.standby, slot.live.challenger, slot.live.routed_by) == (None, None, RoutedBy.ONLY)
    assert len(slot.live.shadows) == 2
    assert len(refusals) == 1
    assert slot.refused is not None
    assert "fraudgate 2" in slot.refused


async def test_shares_change_between_two_batches_without_loading_a_model_again(models: Path) -> None:
    slot = ModelSlot(models, routing=Routing(challenger_share=0.0))
    await slot.refresh()
    before = slot.live
    assert (before.challenger, before.share) == (None, 0.0)
    write_routing(models, Routing(challenger_share=0.4))
    await slot.refresh()
    assert slot.live.challenger is before.standby is not None
    assert slot.live.champion is before.champion
    assert slot.live.share == 0.4
    (models / ROUTING_FILE).write_text("{")
    await slot.refresh()
    assert slot.live.share == 0.4, "a file that can't be read changes nothing"
    (models / ROUTING_FILE).unlink()
    await slot.refresh()
    assert slot.live.share == 0.0, "without a file the settings hold"


async def test_a_new_challenger_is_loaded_beside_the_champion_which_stays_the_same_object(models: Path) -> None:
    slot = ModelSlot(models)
    await slot.refresh()
    champion = slot.live.champion
    manifest = read_manifest(models)
    write_manifest(models, msgspec.structs.replace(manifest, routes=manifest.routes | {"challenger": manifest.routes["shadow"]}))
    await slot.refresh()
    assert slot.live.champion is champion
    assert slot.live.standby is not None
    assert slot.live.standby.ref.version == "3"


async def test_what_the_guard_took_out_stays_out_over_a_restart_until_it_is_cleared(models: Path) -> None:
    slot = ModelSlot(models)
    await slot.refresh()
    assert slot.live.standby is not None
    digest = slot.live.standby.digest
    slot.take_out(digest)
    assert (slot.live.challenger, slot.live.routed_by, slot.live.share) == (None, RoutedBy.GUARD, 0.0)
    take_out(models, Verdict(name="fraudgate", version="2", digest=digest, test="declines", detail="", at_ms=1))
    await slot.refresh()
    again = ModelSlot(models)
    await again.refresh()
    assert again.live.routed_by is RoutedBy.GUARD
    clear_guard(models)
    for each in (slot, again):
        await each.refresh()
        assert (each.live.routed_by, each.live.share) == (RoutedBy.SHARE, 0.1)


async def test_another_version_is_let_in_while_the_one_before_is_out(models: Path) -> None:
    slot = ModelSlot(models)
    await slot.refresh()
    assert slot.live.standby is not None
    take_out(models, Verdict(name="f", version="2", digest=slot.live.standby.digest, test="declines", detail="", at_ms=1))
    await slot.refresh()
    assert slot.live.share == 0
    manifest = read_manifest(models)
    write_manifest(models, msgspec.structs.replace(manifest, routes=manifest.routes | {"challenger": manifest.routes["shadow"]}))
    await slot.refresh()
    assert slot.live.challenger is not None
    assert slot.live.routed_by is RoutedBy.SHARE


async def test_while_nobody_can_say_who_is_out_the_champion_has_all_traffic(models: Path) -> None:
    (models / GUARD_FILE).write_text("{")
    slot = ModelSlot(models)
    await slot.refresh()
    assert (slot.live.challenger, slot.live.routed_by) == (None, RoutedBy.GUARD)


class Broken:
    """A session that raises, or gives what is no number."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def run(self, _outputs: list[str], inputs: dict[str, npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
        if self._error is not None:
            raise self._error
        return [np.full((len(next(iter(inputs.values()))), 2), np.nan, np.float32)]


@pytest.mark.parametrize("how", ["raises", "no number"])
async def test_a_challenger_that_fails_costs_nobody_an_answer_and_is_out(models: Path, how: str) -> None:
    slot = ModelSlot(models, routing=Routing(challenger_share=0.5))
    await slot.refresh()
    assert slot.live.challenger is not None
    challenger = slot.live.challenger
    challenger._session = Broken(ORT_ERRORS[0]("broken") if how == "raises" else None)
    jobs = make_jobs()
    results, receipts = await decide(make_scorer(StubStore(observation_of(jobs)), slot), jobs)
    assert len(receipts) == len(jobs)
    assert {(r.route, r.routed_by) for r in receipts} == {("champion", "guard")}
    assert all(r.answer is not None and r.answer.probability is not None for r in results)
    assert slot.live.share == 0
    assert slot.broken is challenger


async def test_more_shadows_than_are_allowed_are_refused_and_the_rest_serve(models: Path) -> None:
    manifest = read_manifest(models)
    entry = manifest.routes["shadow"]
    many = {f"shadow-{i:02d}": entry for i in range(9)}
    write_manifest(models, msgspec.structs.replace(manifest, routes={"champion": manifest.routes["champion"], **many}))
    slot = ModelSlot(models)
    await slot.refresh()
    assert [m.ref.route for m in slot.live.shadows] == [f"shadow-{i:02d}" for i in range(8)]
    assert slot.live.champion is not None
    assert slot.refused is not None


async def test_a_retry_of_a_card_takes_the_same_route_through_either_door_and_in_another_process(models: Path) -> None:
    jobs = make_jobs(50)
    kafka = [make_job(make_transaction(f"k{i}", card_id=f"card-{i}"), offset=i) for i in range(50)]
    found = []
    for batch in (jobs, kafka):
        slot = ModelSlot(models, routing=Routing(challenger_share=0.5))
        await slot.refresh()
        _, receipts = await decide(make_scorer(StubStore(observation_of(batch)), slot), batch)
        found.append([r.route for r in receipts])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2


def test_nothing_serves_before_there_is_a_manifest(tmp_path: Path) -> None:
    assert ModelSlot(tmp_path).live == Live()
