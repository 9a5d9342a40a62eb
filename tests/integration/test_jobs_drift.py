"""Drift on real Kafka, Spark and Delta: receipts become rows of the table drift once, with the driver killed on the way."""

from __future__ import annotations

import dataclasses
import secrets
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from confluent_kafka import Producer
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from deploy.stack import Stack
from feature_jobs.drift import COLUMNS, Windows, load_champion
from feature_jobs.tail import Tail
from gateway.contracts import tables
from gateway.contracts.decision import Outcome, Receipt
from gateway.contracts.drift import STEP_MS, WINDOW_MS
from gateway.contracts.reference import MEASURES
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LIBRDKAFKA_PARTITIONER
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode_receipt
from tests.factories_drift import AMOUNT, START_MS, make_quiet, make_trained, place_champion
from tests.helpers import local_settings, run_command, running_command
from tests.integration.test_jobs import make_receipt
from tests.unit.gateway.factories import make_transaction

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(600)]

# Simulated time: a Monday noon three weeks after the training rows began.
LIVE_MS = START_MS + 21 * 86_400_000 + 12 * 3_600_000
RATE = 40
SHIFTED_MINUTE = 24
MINUTES = 46


def receipts_of(run: str, minute: int) -> list[Receipt]:
    """Those of one minute, each of its own card, merchant, device and address; from SHIFTED_MINUTE on amounts are twenty times as large."""
    rng = np.random.default_rng(minute)
    t = np.sort(rng.integers(0, STEP_MS, RATE)) + LIVE_MS + minute * STEP_MS
    features = make_quiet(t, minute)
    if minute >= SHIFTED_MINUTE:
        features[:, AMOUNT] *= 20
    out = []
    for i, (t_ms, row) in enumerate(zip(t.tolist(), features.tolist(), strict=True)):
        name = f"{run}-{minute}-{i}"
        paid = make_transaction(
            transaction_id=name,
            event_time_ms=t_ms,
            card_id=f"{name}-c",
            merchant_id=f"{name}-m",
            device_id=f"{name}-d",
            ip=f"{name}-i",
        )
        p = float(rng.beta(0.3, 12))
        scored = {"features": row, "probability": p, "risk_score": int(p * 1000 + 0.5), "model_digest": "d1", "model_version": "1"}
        out.append(msgspec.structs.replace(make_receipt(paid, Outcome.APPROVE), **scored))
    return out


def produce(settings: Settings, run: str, minutes: range) -> None:
    schema_id = SchemaRegistry(settings.registry).id_of(DECISIONS)
    producer = Producer({"bootstrap.servers": settings.bootstrap, "partitioner": LIBRDKAFKA_PARTITIONER})
    for minute in minutes:
        for receipt in receipts_of(run, minute):
            producer.produce(DECISIONS, frame(schema_id, encode_receipt(receipt)), key=receipt.transaction.card_id)
        producer.poll(0)
    assert producer.flush(30) == 0


def drift_rows(settings: Settings) -> list[dict[str, Any]]:
    try:
        held = DeltaTable(tables.table_uri(settings.tables, tables.DRIFT)).to_pyarrow_table()
    except TableNotFoundError:
        return []
    rows: list[dict[str, Any]] = held.to_pylist()
    return rows


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One of its own: receipts of other tests, of today, would end the windows of these."""
    running = Stack(local_settings(tmp_path_factory.mktemp("drift-home")))
    try:
        running.up()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def settings(stack: Stack) -> Settings:
    return stack.settings


@pytest.fixture(scope="module")
def streamed(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, str]]:
    """(settings, what the metrics port said at the end): the driver is killed after the first windows."""
    home = tmp_path_factory.mktemp("drift")
    own = dataclasses.replace(
        settings,
        tables_uri=str(home / "tables"),
        checkpoints_uri=str(home / "checkpoints"),
        model_dir=str(home / "models"),
        bronze_trigger_ms=200,
        silver_trigger_ms=200,
    )
    place_champion(own.models_path, make_trained())
    run = f"drift{secrets.token_hex(3)}"
    queries = ("jobs", "--queries", "bronze,silver,drift")
    # A commit each few minutes of stream time, as when it runs beside the traffic.
    produce(own, run, range(12))
    with running_command(own, *queries, log_path=home / "jobs.log") as driver:
        driver.wait_until(lambda: drift_rows(own), 200, "drift has its first windows")
        produce(own, run, range(12, 18))
        driver.kill()
    with running_command(own, *queries, log_path=home / "jobs.log") as driver:
        for first in range(18, MINUTES, 14):
            produce(own, run, range(first, min(first + 14, MINUTES)))
            # Through the last full minute of what was sent; the newest one is still open.
            through = LIVE_MS + min(first + 13, MINUTES - 1) * STEP_MS
            driver.wait_until(partial(reached, own, through), 200, "drift has read them")
        said = metrics(own)
        driver.kill()
    ended = run_command(own, *queries[:1], "--once", *queries[1:], timeout_s=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    yield own, said


def metrics(settings: Settings) -> str:
    with urllib.request.urlopen(f"http://{settings.host}:{settings.jobs_port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def stream_time(settings: Settings) -> float:
    """What event time drift has come to, milliseconds; 0 while the port doesn't answer yet."""
    try:
        said = metrics(settings)
    except OSError:
        return 0.0
    lines = [line.split()[-1] for line in said.splitlines() if line.startswith("fraudgate_jobs_drift_stream_timestamp_seconds")]
    return float(lines[0]) * 1000 if lines else 0.0


def reached(settings: Settings, end_ms: int) -> bool:
    return stream_time(settings) >= end_ms


def test_each_window_and_measure_has_one_row_though_the_driver_was_killed_twice(streamed: tuple[Settings, str]) -> None:
    rows = drift_rows(streamed[0])
    assert max(Counter((r["window_end_ms"], r["measure"]) for r in rows).values()) == 1
    whole = [r for r in rows if r["window_end_ms"] % WINDOW_MS == 0]
    ends = sorted({r["window_end_ms"] for r in whole})
    assert ends == [LIVE_MS + k * WINDOW_MS for k in range(1, 5)]
    # All but the outcome: these receipts say approve whatever the score.
    assert Counter(r["window_end_ms"] for r in whole) == {end: len(MEASURES) for end in ends}


def test_a_shift_of_one_feature_alarms_within_ten_minutes_of_stream_time_and_nothing_did_before(
    streamed: tuple[Settings, str],
) -> None:
    alarms = [r for r in drift_rows(streamed[0]) if r["alarm"] and r["measure"] != "decision"]
    assert {r["measure"] for r in alarms} == {"amount_minor"}
    began = LIVE_MS + SHIFTED_MINUTE * STEP_MS
    assert began < min(r["window_end_ms"] for r in alarms) <= began + WINDOW_MS


def test_the_rows_are_what_one_pass_over_the_commits_gives(streamed: tuple[Settings, str]) -> None:
    own = streamed[0]
    champion = load_champion(own)
    assert champion is not None
    windows, tail = Windows(champion), Tail(tables.table_uri(own.tables, tables.DECISIONS))
    newest = tail.newest()
    assert newest is not None
    found: dict[tuple[int, str], tuple[float, float]] = {}
    for version in range(newest + 1):
        receipts = tail.added(version, COLUMNS)
        assert receipts is not None
        if receipts.num_rows:
            for seen in windows.add(receipts, version):
                for i, name in enumerate(MEASURES):
                    found[seen.end_ms, name] = (seen.window.psi[i], seen.window.rows[i])
    for row in drift_rows(own):
        assert found[row["window_end_ms"], row["measure"]] == (row["psi"], row["rows"])


def test_the_metrics_port_tells_of_the_alarm(streamed: tuple[Settings, str]) -> None:
    said = streamed[1]
    assert 'fraudgate_jobs_drift_alarm{measure="amount_minor"} 1.0' in said
    assert 'fraudgate_jobs_drift_alarm{measure="card_count_24h"} 0.0' in said
    assert "fraudgate_jobs_drift_reference 1.0" in said
