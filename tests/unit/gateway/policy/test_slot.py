"""Which policy decides while its files change: the last good one, whole, exchanged between two batches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.contracts.lists import ListAction, ListBook, book_as_of
from gateway.errors import PolicyRefusedError
from gateway.kafka.avro import receipt_of
from gateway.metrics import Metrics
from gateway.models.model import ModelSlot
from gateway.policy import Policy
from gateway.policy.lists import UNKNOWN
from gateway.policy.slot import PolicySlot, Steering, expect_counts, open_policy, signature
from gateway.redis.store import Observation
from gateway.redis.unobserved import Unobserved
from gateway.scoring.job import Job, Result
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.requests import Requests
from gateway.scoring.scorer import Scorer
from tests.unit.contracts.test_lists import make_change
from tests.unit.gateway.factories import NOW_MS, StubStore, make_job, make_observation, make_transaction
from tests.unit.gateway.policy.factories import NEVER_BY_SCORE, make_list, make_policy, make_rule
from tests.unit.gateway.policy.files import change_policy, write_policy

pytestmark = pytest.mark.anyio


class Watched:
    """A slot on a policy of its own, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.path = write_policy(folder)
        self.changes: list[tuple[str, str]] = []
        self.refusals: list[str] = []
        self.slot = open_policy(
            str(self.path),
            on_change=lambda policy, before: self.changes.append((before.digest, policy.digest)),
            on_refused=self.refusals.append,
        )

    async def look(self) -> None:
        """As often as a change needs to be found, and to be seen to be at rest."""
        for _ in range(2):
            await self.slot.refresh()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


async def test_a_changed_policy_decides_from_the_next_batch_on(watched: Watched) -> None:
    slot, first = watched.slot, watched.slot.live
    await watched.look()
    assert watched.slot.live is first
    change_policy(watched.path, "two")
    await watched.look()
    assert slot.policy.name == "two"
    assert watched.changes == [(first.policy.digest, slot.policy.digest)]
    # What a batch has read stays what it was.
    assert first.policy.name != "two"


async def test_a_policy_that_can_not_be_used_is_refused_once_and_the_old_one_stays(watched: Watched) -> None:
    slot, first = watched.slot, watched.slot.live
    good = change_policy(watched.path, None)
    await watched.look()
    await watched.look()
    assert watched.slot.live is first
    assert len(watched.refusals) == 1
    assert slot.refused == watched.refusals[0]
    assert str(watched.path) in slot.refused
    assert watched.changes == []
    # The same again is no news, and nothing is wrong any more.
    good()
    await watched.look()
    assert watched.slot.refused is None
    assert watched.slot.live is first


async def test_files_that_are_still_being_written_are_left_alone(watched: Watched) -> None:
    slot, first = watched.slot, watched.slot.live
    for text in ("a", "b", "c"):
        change_policy(watched.path, text)
        await slot.refresh()
        assert watched.slot.live is first
    await slot.refresh()
    assert slot.policy.name == "c"


async def test_a_policy_whose_files_change_while_they_are_read_is_read_again(tmp_path: Path) -> None:
    path = write_policy(tmp_path)
    loads = 0

    def load(source: str) -> Policy:
        nonlocal loads
        loads += 1
        if loads == 1:
            change_policy(path, "three")
        return open_policy(source, on_change=lambda *_: None, on_refused=lambda _: None).policy

    slot = PolicySlot(load(""), str(path), seen=None, load=load)
    loads, first = 0, slot.live
    change_policy(path, "two")
    await slot.refresh()
    await slot.refresh()
    assert (loads, slot.live) == (1, first)
    await slot.refresh()
    await slot.refresh()
    assert slot.policy.name == "three"


async def test_the_lists_change_without_the_policy(watched: Watched) -> None:
    slot = watched.slot
    policy, book = slot.policy, ListBook()
    assert slot.live.lists is UNKNOWN
    slot.use_lists(book)
    assert (slot.live.policy, slot.live.lists) == (policy, book)
    change_policy(watched.path, "two")
    await watched.look()
    assert slot.live.lists is book


async def test_the_policy_that_ships_is_not_watched() -> None:
    slot = open_policy("", on_change=lambda *_: None, on_refused=lambda _: None)
    first = slot.live
    await slot.refresh()
    assert slot.live is first


def test_a_gateway_does_not_start_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusedError):
        open_policy(str(tmp_path / "none"), on_change=lambda *_: None, on_refused=lambda _: None)


def test_a_folder_differs_when_a_file_in_it_does_or_it_is_another(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "rules").mkdir(parents=True)
        (folder / "policy.yaml").write_text("a")
        (folder / "rules" / "r.yaml").write_text("b")
    link = tmp_path / "link"
    link.symlink_to(one)
    seen = [signature(str(link))]
    (one / "rules" / "r.yaml").write_text("bb")
    seen.append(signature(str(link)))
    (one / "rules" / "s.yaml").write_text("c")
    seen.append(signature(str(link)))
    os.replace(one / "rules" / "s.yaml", one / "policy.yaml")
    seen.append(signature(str(link)))
    link.unlink()
    link.symlink_to(two)
    seen.append(signature(str(link)))
    link.unlink()
    seen.append(signature(str(link)))
    assert len(set(seen)) == len(seen)


class SteppingStore(StubStore):
    """Lets others run while a batch waits for Redis, as it does."""

    async def observe(
        self, batch: Sequence[Job], _requests: Requests, _timeout_s: float, update: bool = True
    ) -> Observation | None:
        for _ in range(len(batch) % 3):
            await asyncio.sleep(0)
        return make_observation(len(batch))


async def test_no_batch_is_decided_by_two_policies_or_two_states_of_the_lists(tmp_path: Path) -> None:
    lists = (make_list("seen", "watch"),)
    policies = [
        make_policy(
            make_rule("amount_minor >= 0", f"live-{i}"),
            make_rule("amount_minor >= 0", f"shadow-{i}", state="shadow"),
            bands=NEVER_BY_SCORE,
            lists=lists,
        )
        for i in range(4)
    ]
    digests = {policy.digest: i for i, policy in enumerate(policies)}
    changes = [make_change(f"card-{i % 3}", "seen", action=ListAction.REMOVE if i % 5 > 2 else ListAction.ADD) for i in range(60)]
    slot = PolicySlot(policies[0], lists=ListBook())
    models, metrics, recent = ModelSlot(tmp_path), Metrics(), RecentDecisions(600, clock_s=lambda: 0.0)

    def make_scorer() -> Scorer:
        store: Any = SteppingStore(None)
        unobserved = Unobserved(store, metrics)
        return Scorer(
            store, models, slot, metrics, recent, unobserved, feature_budget_ms=40, code_version="t", now_ms=lambda: NOW_MS
        )

    results: list[Result] = []
    deciding = 0

    async def door(prefix: str) -> None:
        nonlocal deciding
        deciding += 1
        scorer = make_scorer()
        for n in range(60):
            batch = [make_job(make_transaction(f"{prefix}-{n}-{i}", card_id=f"card-{i % 4}")) for i in range(1 + n % 7)]
            results.extend(await scorer.decide(batch))
            await asyncio.sleep(0)
        deciding -= 1

    async def steer() -> int:
        n = 0
        while deciding or not n:
            slot.live = Steering(policies[n % len(policies)], slot.live.lists)
            await asyncio.sleep(0)
            if n % 2 and slot.live.lists.version < len(changes):
                slot.use_lists(slot.live.lists.applied([(slot.live.lists.version, changes[slot.live.lists.version])]))
            n += 1
        return n

    _, _, exchanged = await asyncio.gather(door("a"), door("b"), steer())
    assert len(results) == 2 * sum(1 + n % 7 for n in range(60))
    books = [book_as_of(list(enumerate(changes)), version) for version in range(len(changes) + 1)]
    seen = set()
    for result in results:
        assert result.receipt is not None
        assert result.answer is not None
        receipt = receipt_of(result.receipt)
        mark = digests[receipt.policy_digest]
        seen.add((mark, receipt.lists_version))
        assert result.answer.rule_hits == receipt.rule_hits == [f"live-{mark}"]
        assert receipt.shadow_hits == [f"shadow-{mark}"]
        card = receipt.transaction.card_id
        assert receipt.list_hits == books[receipt.lists_version].lists_of("card_id", card, receipt.received_at_ms)
    assert exchanged > 50
    assert len(seen) > 50
    hits = metrics.registry.get_sample_value("fraudgate_shadow_hits_total", {"rule": "shadow-0"})
    assert hits == sum(mark == 0 for mark in (digests[receipt_of(r.receipt or b"").policy_digest] for r in results))


def test_counters_of_rules_and_lists_begin_at_0_when_the_policy_comes_into_use() -> None:
    metrics = Metrics()
    rules = [make_rule("amount_minor > 1", id=f"{state}-1", state=state) for state in ("live", "shadow", "off")]
    expect_counts(make_policy(*rules, lists=[make_list("blocked", "block")]), metrics)
    counted = {
        (sample.name, *sample.labels.values())
        for metric in (metrics.rule_hits, metrics.shadow_hits, metrics.rule_errors, metrics.list_hits)
        for family in metric.collect()
        for sample in family.samples
        if sample.value == 0
    }
    assert counted == {
        ("fraudgate_rule_hits_total", "live-1"),
        ("fraudgate_shadow_hits_total", "shadow-1"),
        ("fraudgate_rule_errors_total", "live-1"),
        ("fraudgate_rule_errors_total", "shadow-1"),
        ("fraudgate_list_hits_total", "blocked"),
    }
