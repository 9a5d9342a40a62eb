"""Shadow models and the guard's pairs: scored after the answers, in bounds, and without any part in them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gateway.contracts.model_meta import read_manifest, write_manifest
from gateway.contracts.routing import Routing
from gateway.metrics import Metrics
from gateway.models.guard import Guard
from gateway.models.model import Model, ModelSlot
from gateway.models.slack import Scored, Slack
from gateway.policy import load_policy
from gateway.policy.slot import PolicySlot
from gateway.redis.unobserved import Unobserved
from gateway.scoring.job import Job, requests_of
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.requests import Requests
from gateway.scoring.scorer import Scorer
from tests.helpers import until
from tests.unit.gateway.factories import NOW_MS, StubStore, make_observation
from tests.unit.gateway.models.test_routes import make_jobs

pytestmark = pytest.mark.anyio


@pytest.fixture
def models(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "models"))


def with_shadows(models: Path, count: int) -> None:
    manifest = read_manifest(models)
    routes = {"champion": manifest.routes["champion"]}
    for i in range(count):
        routes[f"shadow-{i}"] = manifest.routes["shadow" if i % 2 else "shadow-b"]
    write_manifest(models, type(manifest)(routes=routes))


def value_of(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


Payments = Sequence[tuple[Requests, Any]]
Scores = Sequence[tuple[Model, npt.NDArray[np.float64]]]


class Published:
    def __init__(self) -> None:
        self.scores: list[tuple[str, dict[str, float]]] = []

    def __call__(self, payments: Payments, scores: Scores) -> None:
        ids = [str(name) for requests, rows in payments for name in requests.texts("transaction_id", rows)]
        self.scores += [(model.ref.route, dict(zip(ids, probability.tolist(), strict=True))) for model, probability in scores]


async def decide(slot: ModelSlot, jobs: list[Job], slack: Slack | None) -> list[bytes]:
    """The packed parts of answers and receipts that mustn't depend on anything but the models that answer."""
    observation = make_observation(len(jobs))
    observation.matrix[:, 0] = [job.transaction.amount_minor for job in jobs]
    store: Any = StubStore(observation)
    scorer = Scorer(
        store,
        slot,
        PolicySlot(load_policy("")),
        Metrics(),
        RecentDecisions(600, clock_s=lambda: 0.0),
        Unobserved(store, Metrics()),
        feature_budget_ms=40,
        code_version="test",
        slack=slack,
        now_ms=lambda: NOW_MS,
        clock_s=lambda: 0.0,
    )
    return [r.receipt or b"" for r in await scorer.decide(jobs)]


async def test_answers_and_receipts_are_the_same_with_three_shadows_and_without(models: Path) -> None:
    jobs, published, metrics = make_jobs(64), Published(), Metrics()
    whole = read_manifest(models)
    with_shadows(models, 0)
    slot = ModelSlot(models)
    await slot.refresh()
    without = await decide(slot, jobs, None)
    write_manifest(models, whole)
    with_shadows(models, 3)
    await slot.refresh()
    slack = Slack(metrics, published)
    slack.start()
    beside = await decide(slot, jobs, slack)
    await until(lambda: len(published.scores) == 3, 30)
    slack.stop()
    assert beside == without
    for route, scores in published.scores:
        model = next(m for m in slot.live.shadows if m.ref.route == route)
        matrix = make_observation(64).matrix
        matrix[:, 0] = [job.transaction.amount_minor for job in jobs]
        assert list(scores) == [job.transaction_id for job in jobs]
        assert list(scores.values()) == model.probability(matrix).tolist()
        assert value_of(metrics, "fraudgate_shadow_scored_total", route=route) == 64


async def test_a_shadow_that_raises_costs_the_others_nothing_and_is_counted(models: Path) -> None:
    with_shadows(models, 3)
    slot = ModelSlot(models)
    await slot.refresh()
    broken = slot.live.shadows[0]

    def fail(_: object) -> None:
        raise RuntimeError("broken")

    broken.probability = fail  # type: ignore[method-assign, assignment]
    published, metrics = Published(), Metrics()
    slack = Slack(metrics, published)
    slack.start()
    first, second = make_jobs(8), make_jobs(16)[8:]
    assert all(await decide(slot, first, slack))
    assert all(await decide(slot, second, slack))
    await until(lambda: sum(len(scores) for _, scores in published.scores) == 2 * 16, 30)
    slack.stop()
    assert {route for route, _ in published.scores} == {"shadow-1", "shadow-2"}
    assert value_of(metrics, "fraudgate_shadow_failed_total", route="shadow-0") >= 1


async def test_a_slow_shadow_costs_the_oldest_batches_their_scores_and_no_answer_its_time(models: Path) -> None:
    with_shadows(models, 1)
    slot = ModelSlot(models)
    await slot.refresh()
    go, began = threading.Event(), threading.Event()

    def slow(_: Payments, __: Scores) -> None:
        began.set()
        go.wait(60)

    metrics = Metrics()
    slack = Slack(metrics, slow, batches_max=3)
    slack.start()
    jobs = make_jobs(80)
    assert all(await decide(slot, jobs[:8], slack))
    await until(began.is_set, 30)
    for i in range(1, 10):
        # Answered while the shadow stands still.
        assert all(await decide(slot, jobs[8 * i : 8 * i + 8], slack))
    assert value_of(metrics, "fraudgate_slack_dropped_total") == 6 * 8
    go.set()
    await until(lambda: value_of(metrics, "fraudgate_slack_batches") == 0, 30)
    slack.stop()
    assert value_of(metrics, "fraudgate_shadow_scored_total", route="shadow-0") == 4 * 8


async def test_a_bug_in_one_batch_leaves_the_thread_alive(models: Path) -> None:
    with_shadows(models, 1)
    slot = ModelSlot(models)
    await slot.refresh()
    calls: list[int] = []

    def publish(payments: Payments, _: Scores) -> None:
        calls.append(sum(len(rows) for _, rows in payments))
        if len(calls) == 1:
            raise KeyError("a bug")

    slack = Slack(Metrics(), publish)
    slack.start()
    jobs = make_jobs(8)
    await decide(slot, jobs[:3], slack)
    await until(lambda: calls == [3], 30)
    await decide(slot, jobs[3:], slack)
    await until(lambda: calls == [3, 5], 30)
    slack.stop()


async def test_the_guard_sees_what_either_model_would_have_decided_whoever_answered(models: Path) -> None:
    slot = ModelSlot(models, routing=Routing(challenger_share=0.5))
    await slot.refresh()
    live = slot.live
    assert live.champion is not None
    assert live.challenger is not None
    seen: list[tuple[Any, ...]] = []

    class Watching(Guard):
        def sighted(self, *args: Any) -> None:
            seen.append(args)

    jobs = make_jobs(64)
    slack = Slack(Metrics(), Published(), Watching(slot, models, Metrics()))
    added: list[Scored] = []
    slack.add = added.append  # type: ignore[method-assign, assignment]
    await decide(slot, jobs, slack)
    slack.pair(added)
    [(_, _, rows, challenger, champion)] = seen
    matrix = make_observation(64).matrix
    matrix[:, 0] = [job.transaction.amount_minor for job in jobs]
    by_alone: Callable[[Model], npt.NDArray[np.float64]] = lambda m: np.floor(m.probability(matrix) * 1000 + 0.5)  # noqa: E731
    assert rows.tolist() == list(range(64))
    assert challenger[1].tolist() == by_alone(live.challenger).tolist()
    assert champion[1].tolist() == by_alone(live.champion).tolist()
    assert requests_of(jobs).amount_minor.tolist() == [job.transaction.amount_minor for job in jobs]
    assert 0 < int((champion[0] == 3).sum()) < 64


async def test_shadows_wait_for_an_idle_moment_and_the_guards_pairs_do_not(models: Path) -> None:
    slot = ModelSlot(models, routing=Routing(challenger_share=0.5))
    await slot.refresh()
    paired, published, busy = threading.Event(), Published(), threading.Event()
    busy.set()
    looked: list[bool] = []

    class Watching(Guard):
        def sighted(self, *_: Any) -> None:
            paired.set()

    def idle() -> bool:
        looked.append(paired.is_set())
        return not busy.is_set()

    metrics = Metrics()
    slack = Slack(metrics, published, Watching(slot, models, metrics), idle=idle)
    slack.start()
    await decide(slot, make_jobs(8), slack)
    await until(lambda: len(published.scores) == 2, 30)
    slack.stop()
    # It looked for a moment after the guard had its pairs, and went on without one in the end.
    assert len(looked) > 5
    assert all(looked)
