"""The backtest of an unchanged policy against the gateway's own scorer: from its receipts in Delta, every decision and every hit again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from deploy.history.backtest import compare, decide
from deploy.history.backtest_rows import DeltaHistory
from deploy.history.list_books import ListBooks
from gateway.contracts import tables
from gateway.contracts.lists import ListAction, ListBook, ListChange
from gateway.contracts.settings import Settings
from gateway.kafka.avro import receipt_fields
from gateway.metrics import Metrics
from gateway.models.model import ModelSlot, load_model
from gateway.policy import Policy, load_policy
from gateway.policy.slot import PolicySlot
from gateway.redis.unobserved import Unobserved
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.scorer import Scorer
from model_export.cost import CostModel
from tests.agreement.test_offline_engine_equals_a_recount import silver_of
from tests.entities import make_stream
from tests.factories_model import make_features
from tests.unit.gateway.factories import NOW_MS, StubStore, make_job, make_observation, write_model

pytestmark = pytest.mark.anyio

BATCH_ROWS = 40
BATCHES = 24
DDL = {"risk_score": pa.int32(), "probability": pa.float64(), "features": pa.list_(pa.float32())}

POLICY = {
    "policy.yaml": """version: 2
name: test
bands:
  - {up_to_minor: 5000, challenge: 200, review: 600, decline: 900, without_model: approve}
  - {up_to_minor: null, challenge: 100, review: 400, decline: 700, without_model: review}
lists:
  - {id: blocked, field: card_id, kind: block, owner: risk, text: blocked}
  - {id: watched, field: merchant_id, kind: watch, owner: risk, text: watched}
  - {id: trusted, field: customer_id, kind: allow, owner: risk, text: trusted}
""",
    "rules/all.yaml": "rules:"
    + "".join(
        f"""
  - id: {name}
    state: {state}
    owner: risk
    text: {name}
    when: '{when}'
    outcome: {outcome}
    reason: CARD_VELOCITY
    hard: {hard}"""
        for name, state, when, outcome, hard in (
            ("busy", "live", 'card_count_5m > 4 and channel == "ecom"', "review", "false"),
            ("far", "live", "country != card_country and score > 50", "challenge", "false"),
            ("big", "live", "amount_minor > 60000", "decline", "true"),
            # Divides by nothing.
            ("odd", "shadow", "card_count_1h / (card_count_1h - card_count_1h) > 1", "review", "false"),
            ("seen", "shadow", 'known(device_id) and merchant_id in list("watched")', "decline", "false"),
        )
    ),
}


def changes_of(cards: list[str], merchants: list[str], customers: list[str]) -> list[tuple[int, ListChange]]:
    """Entries come and go; some expire before the payments are received."""
    found: list[ListChange] = []
    for n in range(30):
        list_id, field, values = [
            ("blocked", "card_id", cards),
            ("watched", "merchant_id", merchants),
            ("trusted", "customer_id", customers),
        ][n % 3]
        found.append(
            ListChange(
                list_id=list_id,
                entity_field=field,
                action=ListAction.REMOVE if n % 7 == 6 else ListAction.ADD,
                entity_value=values[n // 3 % len(values)],
                expires_at_ms=NOW_MS - 1 if n % 5 == 4 else None,
                reason="",
                who="ann",
                at_ms=NOW_MS,
            )
        )
    return list(enumerate(found))


@pytest.mark.parametrize("shipped", [True, False])
async def test_every_receipt_is_decided_again_as_it_was(tmp_path: Path, shipped: bool) -> None:
    policy = load_policy("") if shipped else Policy({name: text.encode() for name, text in POLICY.items()}, "test")
    write_model(tmp_path / "models", above_minor=3_000)
    with_model, without = ModelSlot(tmp_path / "models"), ModelSlot(tmp_path / "none")
    with_model.model = load_model(tmp_path / "models", "champion")
    stream = make_stream(5, BATCH_ROWS * BATCHES, 1_000, 0)
    cards, merchants, customers = (sorted({getattr(t, f) for t in stream}) for f in ("card_id", "merchant_id", "customer_id"))
    changes = changes_of(cards, merchants, customers)
    features = make_features(len(stream))
    books = ListBooks(changes)
    receipts: list[dict[str, Any]] = []
    for n in range(BATCHES):
        rows = slice(n * BATCH_ROWS, (n + 1) * BATCH_ROWS)
        observation = make_observation(BATCH_ROWS)
        observation.matrix[:] = features[rows]
        observation.matrix[:, 0] = [t.amount_minor for t in stream[rows]]
        store: Any = StubStore(observation if n % 4 < 2 else None)
        slot = PolicySlot(policy, lists=books.at(n) if n > 2 else ListBook())
        scorer = Scorer(
            store,
            with_model if n % 2 else without,
            slot,
            Metrics(),
            RecentDecisions(600, clock_s=lambda: 0.0),
            Unobserved(store, Metrics()),
            feature_budget_ms=40,
            code_version="test",
            now_ms=lambda: NOW_MS,
            clock_s=lambda: 0.0,
        )
        for result in await scorer.decide([make_job(t) for t in stream[rows]]):
            assert result.receipt is not None
            fields = receipt_fields(result.receipt)
            receipts.append(fields | {"event_time_ms": fields["transaction"]["event_time_ms"]})
    own = Settings(home=str(tmp_path))
    write(own, tables.SILVER, silver_of(stream))
    columns = [name for name in receipts[0] if name != "transaction"]
    write(own, tables.DECISIONS, pa.table({c: pa.array([r[c] for r in receipts], DDL.get(c)) for c in columns}))

    history = DeltaHistory(own, None, None, NOW_MS, 7, part_rows=100)
    found = compare(policy, policy, history.parts(), books, CostModel())
    assert found.payments == found.current.as_logged == found.current.logged == len(stream)
    assert sum(history.left_out.values()) == 0
    logged = {r["transaction_id"]: r for r in receipts}
    for part in history.parts():
        decisions = decide(policy, part, books)
        for row, i in enumerate(part.transaction_id.to_pylist()):
            for name in ("rule_hits", "list_hits", "shadow_hits", "rule_errors"):
                assert getattr(decisions, name)[row] == logged[i][name], (i, name)
    if not shipped:
        assert {len(r["degraded"]) for r in receipts} >= {0, 1}
        met = {one for r in receipts for name in ("rule_hits", "list_hits", "shadow_hits", "rule_errors") for one in r[name]}
        assert met == {"busy", "far", "big", "odd", "seen", "blocked", "watched", "trusted"}
        assert len({r["lists_version"] for r in receipts}) > 10


def write(own: Settings, name: str, rows: pa.Table) -> None:
    write_deltalake(tables.table_uri(own.tables, name), rows)
