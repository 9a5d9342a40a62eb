"""The guard: how soon it acts and how seldom for nothing, by simulation with its own evidence; and what it does when it acts."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest

from gateway.contracts.audit import read_audit
from gateway.contracts.decision import RoutedBy
from gateway.contracts.routing import Routing, Verdict, clear_guard, read_guard
from gateway.contracts.topics import TOPICS
from gateway.kafka.records import guard_record
from gateway.metrics import Metrics
from gateway.models.guard import ALPHA, CUTS, MERCHANTS_MAX, THINGS, Evidence, Guard
from gateway.models.model import ModelSlot, load_model
from gateway.redis.link import RedisUnavailableError
from gateway.scoring.job import requests_of
from tests.factories_model import make_features, make_model_dir
from tests.guard_power import World, doubling_shift, first_alarm, found_at
from tests.unit.gateway.factories import NOW_MS, make_job, make_transaction

pytestmark = pytest.mark.anyio
DAY_MS = 86_400_000


def within(world: World, events: int, runs: int = 300) -> float:
    return sum(n is not None for n in found_at(world, runs, events, 7)) / runs


@pytest.mark.parametrize("cut", [900, 800, 400])
def test_a_challenger_that_doubles_the_declines_by_scoring_higher_is_out_within_2000_payments(cut: int) -> None:
    world = World(cut, shift=doubling_shift(cut))
    before, after = world.rates()
    assert 1.9 < after / before < 2.1
    assert within(world, 2000) >= 0.99


def test_one_that_doubles_declines_of_one_percent_and_more_without_another_sign_is_out_within_2000_payments() -> None:
    before, _ = World(400).rates()
    assert 0.010 < before < 0.012
    assert within(World(400, extra=before / (1 - before)), 2000) >= 0.95


@pytest.mark.slow
def test_two_equal_models_trip_it_in_under_one_percent_of_runs() -> None:
    # Equal in quality, each with an opinion of its own: the hard case. 2,000 runs of 20,000 payments.
    runs = found_at(World(800, noise=1.0), 2000, 20_000, 11, look=500)
    assert sum(n is not None for n in runs) / len(runs) < ALPHA < 0.01


def test_models_trained_apart_from_equal_data_do_not_trip_it(tmp_path: Path) -> None:
    features, models = make_features(20_000, seed=99), []
    for seed in (1, 2, 3):
        make_model_dir(tmp_path, version=str(seed), seed=seed, rows=10_000, trees=80)
        model = load_model(tmp_path, "champion")
        assert model is not None
        models.append(model)
    scores = [np.floor(m.probability(features) * 1000 + 0.5) for m in models]
    for ours, theirs in itertools.permutations(scores, 2):
        champion, challenger = ((s[:, None] >= np.array([880, *CUTS])) for s in (ours, theirs))
        assert first_alarm(challenger, champion, look=500) is None


def test_a_challenger_that_declines_nearly_nothing_is_out_too() -> None:
    evidence = Evidence()
    evidence.counts[:, 2] = 40
    assert evidence.alarm() is not None


def test_one_merchant_of_many_is_enough() -> None:
    evidence = Evidence()
    for i in range(MERCHANTS_MAX - 1):
        evidence.add_merchant(f"m{i}", 0, 3)
    assert evidence.alarm() is None
    evidence.add_merchant("one", 1, 40)
    alarm = evidence.alarm()
    assert alarm is not None
    assert alarm.test == "merchant"
    assert "merchant one: the challenger 40 cards, the champion 0" in alarm.detail
    evidence.add_merchant("one too many", 1, 1000)
    assert len(evidence.merchants) == MERCHANTS_MAX


def test_without_a_sighting_nothing_is_proved() -> None:
    assert Evidence().alarm() is None
    assert all(value < 0 for value in Evidence().logs().values())


@pytest.fixture
def models(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "models"))


class Redis:
    """The guard's script and commands, in a dict."""

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.counts: dict[bytes, bytes] = {}
        self.pairs: set[str] = set()
        self.down = False

    async def __call__(self, _key: str, command: Any, _timeout_s: float) -> Any:
        if self.down:
            raise RedisUnavailableError("down")
        if command[0] == "SADD":
            self.pairs.add(command[2])
            return 1
        if command[0] == "HSETNX":
            if command[2].encode() in self.counts:
                return 0
            self.counts[command[2].encode()] = command[3]
            return 1
        assert command[0] == "EVAL"
        for member, what, how, merchant in zip(*(command[9 + i :: 4] for i in range(4)), strict=True):
            if member not in self.members:
                self.members.add(member)
                for name in [what, *([f"m:{how}:{merchant}"] if merchant else [])]:
                    self.counts[name.encode()] = str(int(self.counts.get(name.encode(), b"0")) + 1).encode()
        return [part for pair in self.counts.items() for part in pair]


class Harness:
    def __init__(self, models: Path, redis: Redis | None) -> None:
        self.slot = ModelSlot(models, routing=Routing(challenger_share=0.1))
        self.metrics = Metrics()
        self.alerts: list[Verdict] = []
        self.now_ms = NOW_MS
        self.guard = Guard(self.slot, models, self.metrics, alert=self.alerts.append, ask=redis, now_ms=lambda: self.now_ms)

    def see(self, first: int, count: int, *, they_decline: bool, we_decline: bool, card: str | None = None) -> None:
        """Payments of cards of their own, or of one."""
        jobs = [make_job(make_transaction(f"t{i}", card_id=card or f"card-{i}")) for i in range(first, first + count)]
        severity = [np.full(count, 3 * does) for does in (they_decline, we_decline)]
        none = np.zeros(count)
        self.guard.sighted(self.slot.live, requests_of(jobs), np.arange(count), (severity[0], none), (severity[1], none))

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def test_an_alarm_takes_the_challenger_out_and_is_told_logged_counted_and_written_down(models: Path) -> None:
    h = Harness(models, None)
    await h.slot.refresh()
    standby = h.slot.live.standby
    assert standby is not None
    h.see(0, 40, they_decline=True, we_decline=False)
    await h.guard.tick()
    assert (h.slot.live.share, h.slot.live.routed_by) == (0.0, RoutedBy.GUARD)
    [verdict] = h.alerts
    assert (verdict.version, verdict.digest) == ("2", standby.digest)
    assert read_guard(models).out == {standby.digest: verdict}
    [entry], _ = read_audit(models)
    assert (entry.action, entry.subject, entry.before) == ("guard", "challenger", "2")
    assert verdict.detail in entry.reason
    assert h.sample("fraudgate_guard_out") == 1
    assert h.sample("fraudgate_guard_alarms_total", test=verdict.test) == 1
    await h.guard.tick()
    assert len(h.alerts) == 1
    record = guard_record(verdict)
    schema = fastavro.parse_schema(json.loads(TOPICS[record.topic].schema_text))
    alert = fastavro.schemaless_reader(io.BytesIO(record.payload), schema, None)
    assert (record.topic, alert["kind"], alert["reasons"]) == ("alerts", "guard", [f"GUARD_{verdict.test.upper()}"])
    assert verdict.detail in alert["detail"]


async def test_a_card_counts_once_however_often_it_pays_and_again_the_next_day(models: Path) -> None:
    h = Harness(models, None)
    await h.slot.refresh()
    for i in range(50):
        h.see(10 * i, 10, they_decline=True, we_decline=False, card="card-x")
    await h.guard.tick()
    assert h.slot.live.share > 0
    pair = h.guard._pair
    assert pair is not None
    assert pair.evidence().counts.tolist() == [[0, 1, 0]] + [[0, 0, 0]] * (THINGS - 1)
    h.now_ms += DAY_MS
    h.see(600, 10, they_decline=True, we_decline=False, card="card-x")
    assert pair.evidence().counts[0].tolist() == [0, 2, 0]


async def test_gateways_add_up_what_they_see_and_one_of_them_tells(models: Path, tmp_path: Path) -> None:
    redis = Redis()
    here, there = Harness(models, redis), Harness(Path(shutil.copytree(models, tmp_path / "elsewhere")), redis)
    for h in (here, there):
        await h.slot.refresh()
    # Neither alone has enough; both saw the same card once.
    for h, first in ((here, 0), (there, 3)):
        h.see(first, 4, they_decline=True, we_decline=False)
        await h.guard.tick()
    assert here.slot.live.share == there.slot.live.share == 0.1
    here.see(100, 10, they_decline=True, we_decline=False)
    await here.guard.tick()
    await there.guard.tick()
    assert int(redis.counts[b"0:1"]) == 7 + 10
    assert here.slot.live.share == there.slot.live.share == 0.0
    assert len(here.alerts) + len(there.alerts) == 1
    assert read_guard(tmp_path / "elsewhere").out.keys() == read_guard(models).out.keys()


async def test_without_redis_a_gateway_goes_by_what_it_sees_and_tells_it_later(models: Path) -> None:
    redis = Redis()
    redis.down = True
    h = Harness(models, redis)
    await h.slot.refresh()
    h.see(0, 8, they_decline=True, we_decline=False)
    await h.guard.tick()
    redis.down = False
    await h.guard.tick()
    assert int(redis.counts[b"0:1"]) == 8
    await h.guard.tick()
    assert int(redis.counts[b"0:1"]) == 8
    redis.down = True
    h.see(100, 30, they_decline=True, we_decline=False)
    await h.guard.tick()
    assert (h.slot.live.share, len(h.alerts)) == (0.0, 1)


async def test_after_it_was_cleared_the_challenger_begins_anew(models: Path) -> None:
    h = Harness(models, None)
    await h.slot.refresh()
    h.see(0, 40, they_decline=True, we_decline=False)
    await h.guard.tick()
    await h.slot.refresh()
    assert h.slot.live.share == 0
    clear_guard(models)
    await h.slot.refresh()
    await h.guard.tick()
    await h.guard.tick()
    assert h.slot.live.share == 0.1
    h.see(100, 5, they_decline=True, we_decline=False)
    await h.guard.tick()
    assert h.slot.live.share == 0.1


async def test_a_verdict_that_can_not_be_written_down_acts_all_the_same_and_is_written_later(models: Path) -> None:
    h = Harness(models, None)
    await h.slot.refresh()
    lock = models / ".guard.lock"
    lock.mkdir()
    h.see(0, 40, they_decline=True, we_decline=False)
    await h.guard.tick()
    assert (h.slot.live.share, len(h.alerts)) == (0.0, 1)
    assert read_guard(models).out == {}
    lock.rmdir()
    await h.guard.tick()
    assert len(read_guard(models).out) == 1
    assert len(h.alerts) == 1


async def test_a_challenger_that_failed_is_written_down_and_told(models: Path) -> None:
    h = Harness(models, None)
    await h.slot.refresh()
    assert h.slot.live.standby is not None
    h.slot.failed(h.slot.live.standby)
    await h.guard.tick()
    assert [v.test for v in h.alerts] == ["failed"]
    assert len(read_guard(models).out) == 1


async def test_another_pair_of_models_has_counts_of_its_own(models: Path) -> None:
    h = Harness(models, None)
    await h.slot.refresh()
    h.see(0, 5, they_decline=True, we_decline=False)
    first = h.guard._pair
    assert first is not None
    live = h.slot.live
    h.slot.live = dataclasses.replace(live, challenger=live.shadows[0], standby=live.shadows[0])
    h.see(100, 1, they_decline=True, we_decline=False)
    assert h.guard._pair is not first
