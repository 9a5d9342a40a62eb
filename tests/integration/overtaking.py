"""One payment decided by two processes, or before it is observed: what must hold of one Redis and of a cluster alike."""

from __future__ import annotations

import numpy as np

from gateway.contracts.layout import BASE_STEP
from gateway.redis.store import Observation, Store
from gateway.scoring.job import Job, requests_of
from tests.unit.gateway.factories import make_job, make_transaction

BUDGET_S = 20.0


async def _observe(store: Store, *jobs: Job) -> Observation:
    found = await store.observe(jobs, requests_of(jobs), BUDGET_S)
    assert found is not None
    return found


async def assert_counts_once_and_the_first_answer_stands(one: Store, other: Store, run: str) -> None:
    """`one` claims a payment and is late; `other` decides it too and is faster. `run` makes the names of this test."""
    t = make_transaction(run, card_id=run)
    late, faster, alone = make_job(t), make_job(t, process=2), make_job(make_transaction(f"{run}-alone", card_id=run))
    first = await _observe(one, late)
    assert (await _observe(other, faster)).settled == [late.claim]
    faster.overtakes = late.claim
    again = await _observe(other, faster)
    assert again.settled == [None]
    assert again.seq.tolist() == first.seq.tolist()
    assert np.array_equal(again.matrix, first.matrix, equal_nan=True)
    theirs = faster.claim + b"theirs"
    assert await other.settle([(faster, theirs), (alone, alone.claim + b"answer")], BUDGET_S) == [None, None]
    assert await one.settle([(late, late.claim + b"ours")], BUDGET_S) == [theirs]
    assert (await _observe(one, late, alone)).settled == [theirs, alone.claim + b"answer"]


async def assert_observed_afterwards_once(store: Store, run: str) -> None:
    """A payment whose gateway had no time to ask Redis, only to store its answer, and one that another gateway has decided."""

    async def observe_decided(job: Job) -> list[bytes | None]:
        found = await store.observe_decided([job], requests_of([job]), BUDGET_S)
        assert found is not None
        return found.settled

    late, t = make_job(make_transaction(f"{run}-late", card_id=run)), make_transaction(f"{run}-elsewhere", card_id=run)
    store.record([(late, late.claim + b"answer")])
    for _ in range(2):
        assert await observe_decided(late) == [None]
    assert (await _observe(store, late)).settled == [late.claim + b"answer"]
    other, elsewhere = make_job(t), make_job(t, process=2)
    places = [(await _observe(store, elsewhere)).seq[0, 0] % BASE_STEP]
    store.record([(elsewhere, elsewhere.claim + b"theirs")])
    assert await observe_decided(other) == [elsewhere.claim + b"theirs"]
    places.append((await _observe(store, make_job(make_transaction(f"{run}-after", card_id=run)))).seq[0, 0] % BASE_STEP)
    # The late one has place 0.
    assert places == [1, 2]
