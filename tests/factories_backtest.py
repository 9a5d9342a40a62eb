"""A small history with a planted fraud ring, as the feature jobs write it, and two policies to try on it: figures to be had by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake
from msgspec import structs

from gateway.contracts import tables
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from tests.agreement.test_offline_engine_equals_a_recount import silver_of
from tests.unit.gateway.factories import make_transaction

DAY_MS = 86_400_000
START_MS = 1_767_571_200_000
# Labels count as of then; a payment of the last seven days is young.
AS_OF_MS = START_MS + 40 * DAY_MS

BANDS = """version: 2
name: {name}
bands:
  - {{up_to_minor: null, challenge: 300, review: 500, decline: 800, without_model: review}}
{lists}"""
LISTS = """lists:
  - {id: blocked-devices, field: device_id, kind: block, owner: risk, text: Devices of rings.}
"""
RULE = """
  - id: {id}
    state: {state}
    owner: risk
    text: {id}
    when: {when}
    outcome: {outcome}
    reason: AMOUNT_LIMIT"""


@dataclass(frozen=True)
class Payment:
    """`label` is (is_fraud, source, state, days after the payment), of several the last stands. `day` is when it was made."""

    amount_minor: int
    score: int | None
    decided: str
    labels: tuple[tuple[bool, str, str, int], ...] = ()
    device_id: str | None = None
    country: str = "DE"
    day: int = 3
    degraded: tuple[str, ...] = ()
    lists_version: int = -1


FRAUD = ((True, "chargeback", "confirmed", 5),)
RING = "device-ring"
# The ring: four frauds, of which the score alone stops the last; a good customer on the same device, whose chargeback was reversed; a
# payment that is too young to tell, and one that was declined, of which nobody will ever know.
PLANTED = (
    Payment(1_000, 100, "approve", FRAUD, RING),
    Payment(3_000, 100, "approve", FRAUD, RING),
    Payment(5_000, 600, "review", ((True, "chargeback", "reported", 30),), RING),
    Payment(7_000, 900, "decline", ((True, "analyst", "confirmed", 1),), RING),
    Payment(1_500, 50, "approve", ((True, "chargeback", "reported", 3), (False, "chargeback", "reversed", 9)), RING),
    Payment(2_500, 50, "approve", (), RING, day=36),
    Payment(4_000, 900, "decline", (), RING),
    # Not the ring's: two large ones, two from abroad, and what is paid every day.
    Payment(200_000, 10, "review"),
    Payment(150_000, 20, "review", FRAUD),
    Payment(5_000, 10, "approve", country="PL"),
    Payment(6_000, 10, "approve", FRAUD, country="PL"),
    *(Payment(2_000, 10, "approve") for _ in range(9)),
    # No model and no features: the policy's outcome without a model.
    Payment(2_000, None, "review", degraded=("static_policy",)),
)


def write_policy(folder: Path, name: str, rules: list[tuple[str, str, str, str]], lists: bool = False) -> Path:
    """`rules` are (id, state, when, outcome)."""
    (folder / "rules").mkdir(parents=True)
    (folder / "policy.yaml").write_text(BANDS.format(name=name, lists=LISTS if lists else ""))
    written = [RULE.format(id=i, state=state, when=when, outcome=outcome) for i, state, when, outcome in rules]
    (folder / "rules" / "all.yaml").write_text("rules:" + ("".join(written) or " []") + "\n")
    return folder


def write_policies(home: Path) -> tuple[Path, Path]:
    """(current, new): the new one turns the rule for large amounts into a shadow and declines the ring's device."""
    current = write_policy(home / "current", "current", [("large", "live", "amount_minor >= 100_000", "review")])
    ring = f"device_id == '{RING}'"
    new = write_policy(
        home / "new",
        "ring",
        [
            ("large", "shadow", "amount_minor >= 100_000", "review"),
            ("ring", "live", ring, "decline"),
            ("cheap-ring", "live", f"{ring} and amount_minor < 2_000", "review"),
            ("abroad", "shadow", "country == 'PL'", "decline"),
        ],
    )
    return current, new


def write_history(settings: Settings, payments: tuple[Payment, ...] = PLANTED, *, commits: int = 2) -> None:
    """Receipts, silver and labels of `payments`, which are p00, p01 and so on, in several commits and not in order of time."""
    made = [_transaction(i, p) for i, p in enumerate(payments)]
    for part in range(commits):
        rows = [i for i in range(len(payments)) if i % commits == part]
        uri = tables.table_uri(settings.tables, tables.SILVER)
        write_deltalake(uri, silver_of([made[i] for i in rows]), mode="append")
        receipts = pa.Table.from_pylist([_receipt(made[i], payments[i]) for i in rows], RECEIPTS)
        write_deltalake(tables.table_uri(settings.tables, tables.DECISIONS), receipts, mode="append")
    labels = [
        {
            "transaction_id": t.transaction_id,
            "is_fraud": is_fraud,
            "source": source,
            "state": state,
            "reported_at_ms": t.event_time_ms + days * DAY_MS,
        }
        for t, p in zip(made, payments, strict=True)
        for is_fraud, source, state, days in p.labels
    ]
    write_deltalake(tables.table_uri(settings.tables, tables.LABELS), pa.Table.from_pylist(labels, LABELS), mode="append")


RECEIPTS = pa.schema(
    [
        ("transaction_id", pa.string()),
        ("event_time_ms", pa.int64()),
        ("received_at_ms", pa.int64()),
        ("features", pa.list_(pa.float32())),
        ("feature_fingerprint", pa.string()),
        ("risk_score", pa.int32()),
        ("probability", pa.float64()),
        ("decision", pa.string()),
        ("policy_decision", pa.string()),
        ("degraded", pa.list_(pa.string())),
        ("lists_version", pa.int64()),
    ]
)
LABELS = pa.schema(
    [
        ("transaction_id", pa.string()),
        ("is_fraud", pa.bool_()),
        ("source", pa.string()),
        ("state", pa.string()),
        ("reported_at_ms", pa.int64()),
    ]
)


def _transaction(i: int, p: Payment) -> Transaction:
    return structs.replace(
        make_transaction(f"p{i:02}", event_time_ms=START_MS + p.day * DAY_MS + i, customer_id=f"customer-{i}"),
        amount_minor=p.amount_minor,
        device_id=p.device_id,
        country=p.country,
    )


def _receipt(t: Transaction, p: Payment) -> dict[str, object]:
    features = np.zeros(len(FEATURE_NAMES), np.float32)
    features[FEATURE_INDEX["amount_minor"]] = p.amount_minor
    return {
        "transaction_id": t.transaction_id,
        "event_time_ms": t.event_time_ms,
        "received_at_ms": t.event_time_ms,
        "features": features,
        "feature_fingerprint": FINGERPRINT,
        "risk_score": 500 if p.score is None else p.score,
        "probability": None if p.score is None else p.score / 1000,
        "decision": p.decided,
        "policy_decision": p.decided,
        "degraded": list(p.degraded),
        "lists_version": p.lists_version,
    }
