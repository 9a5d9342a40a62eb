"""`python -m deploy.history.backtest_bench --rows 1000000`: writes a history of that size to a directory of its own and backtests it.

The receipts are made up: features at random, a score that follows them, a fraud in a hundred, the shipped policy's own decisions. What is
measured is reading, joining, deciding twice and counting, and the most memory that took.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from deploy.history.backtest import OUTCOMES, compare, decide
from deploy.history.backtest_report import Report, as_text
from deploy.history.backtest_rows import DAY_MS, DeltaHistory, Int64s, Known, Part, requests_of
from deploy.history.list_books import ListBooks
from gateway.contracts import tables
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT
from gateway.contracts.settings import Settings
from gateway.policy import Policy, load_policy
from model_export.cost import CostModel

START_MS = 1_767_571_200_000
DAYS = 30
# Rows of one commit, as the feature jobs write them a few at a time.
COMMIT_ROWS = 25_000
FRAUD_SHARE = 0.01
LABEL_DELAY_DAYS = 3


def write_history(settings: Settings, rows: int, seed: int = 1) -> None:
    """`rows` receipts over DAYS in order of time, their payments and the labels of the frauds that went through."""
    rng = np.random.default_rng(seed)
    t_ms = np.sort(rng.integers(START_MS, START_MS + DAYS * DAY_MS, rows))
    for first in range(0, rows, COMMIT_ROWS):
        at = t_ms[first : first + COMMIT_ROWS]
        _write_some(settings, load_policy(""), first, at, rng)


def _write_some(settings: Settings, policy: Policy, first: int, t_ms: Int64s, rng: np.random.Generator) -> None:
    n = len(t_ms)
    fraud = rng.random(n) < FRAUD_SHARE
    features = rng.exponential(1.0, (n, len(FEATURE_NAMES))).astype(np.float32)
    amount = np.maximum(1, rng.lognormal(8.0, 1.2, n) * np.where(fraud, 3, 1)).astype(np.int64)
    features[:, FEATURE_INDEX["amount_minor"]] = amount
    score = np.clip(rng.normal(np.where(fraud, 650, 120), 120), 0, 1000).astype(np.int32)
    ids = pa.array([f"t{i:09d}" for i in range(first, first + n)])
    payments = {
        "transaction_id": ids,
        "event_time_ms": pa.array(t_ms, pa.int64()),
        "card_id": _names("card", rng, n, 200_000),
        "customer_id": _names("customer", rng, n, 150_000),
        "merchant_id": _names("merchant", rng, n, 5_000),
        "amount_minor": pa.array(amount, pa.int64()),
        "currency": pa.array(["EUR"] * n),
        "channel": pa.array(rng.choice(["pos", "ecom"], n)),
        "mcc": pa.array(rng.choice(["5411", "5999", "7995"], n)),
        "country": pa.array(rng.choice(["DE", "FR", "PL"], n)),
        "device_id": _names("device", rng, n, 100_000),
        "ip": _names("ip", rng, n, 50_000),
        "card_bin": pa.array(rng.choice(["411111", "550000"], n)),
        "card_country": pa.array(rng.choice(["DE", "FR"], n)),
        "latitude": pa.array([None] * n, pa.float64()),
        "longitude": pa.array([None] * n, pa.float64()),
    }
    table = pa.table(payments)
    part = Part(
        transaction_id=ids,
        customer_id=payments["customer_id"],
        requests=requests_of(table),
        matrix=features,
        score=score.astype(np.float64),
        received_at_ms=t_ms,
        has_features=np.ones(n, bool),
        lists_version=np.zeros(n, np.int64),
        known=np.full(n, Known.GENUINE, np.int8),
        logged=np.full(n, -1),
    )
    outcomes = [OUTCOMES[s].value for s in decide(policy, part, ListBooks([])).severity.tolist()]
    receipts = {
        "transaction_id": ids,
        "event_time_ms": payments["event_time_ms"],
        "received_at_ms": payments["event_time_ms"],
        "features": pa.ListArray.from_arrays(
            pa.array(np.arange(n + 1) * len(FEATURE_NAMES), pa.int32()), pa.array(features.ravel())
        ),
        "feature_fingerprint": pa.array([FINGERPRINT] * n),
        "risk_score": pa.array(score, pa.int32()),
        "probability": pa.array(score / 1000),
        "decision": pa.array(outcomes),
        "policy_decision": pa.array(outcomes),
        "degraded": pa.array([[]] * n, pa.list_(pa.string())),
        "lists_version": pa.array(np.zeros(n), pa.int64()),
    }
    seen = fraud & (np.array(outcomes) != "decline")
    labels = {
        "transaction_id": ids.filter(pa.array(seen)),
        "is_fraud": pa.array([True] * int(seen.sum())),
        "source": pa.array(["chargeback"] * int(seen.sum())),
        "state": pa.array(["confirmed"] * int(seen.sum())),
        "reported_at_ms": pa.array(t_ms[seen] + LABEL_DELAY_DAYS * DAY_MS, pa.int64()),
    }
    for name, columns in ((tables.DECISIONS, receipts), (tables.SILVER, payments), (tables.LABELS, labels)):
        write_deltalake(tables.table_uri(settings.tables, name), pa.table(columns), mode="append")


def _names(what: str, rng: np.random.Generator, n: int, distinct: int) -> pa.Array:
    return pa.array([f"{what}-{i}" for i in rng.integers(0, distinct, n)])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write a history of made-up receipts and measure a backtest over it.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--home", type=Path, help="where the tables go and stay (default: a directory that is removed)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        settings = dataclasses.replace(Settings(), home=str(options.home or scratch))
        if not Path(tables.table_uri(settings.tables, tables.DECISIONS)).exists():
            started = time.monotonic()
            write_history(settings, options.rows)
            print(f"written     {options.rows:,} receipts in {time.monotonic() - started:.1f} s", flush=True)
        started, cpu = time.monotonic(), time.process_time()
        history = DeltaHistory(settings, None, None, START_MS + (DAYS + 10) * DAY_MS, 7)
        policy = load_policy("")
        found = compare(policy, policy, history.parts(), ListBooks([]), CostModel())
        print(as_text(Report(found, dict(history.left_out), "the end", public=False)))
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"\nbacktest    {time.monotonic() - started:.1f} s, {time.process_time() - cpu:.1f} s of CPU, {found.payments:,} receipts;"
            f" at most {peak_mb:,.0f} MB, with what wrote them where that was this process"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
