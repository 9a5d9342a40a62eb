"""The stream of drift over a Delta table of receipts, without Spark: what it writes, once, however often it is stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError

from feature_jobs import drift as drift_module
from feature_jobs.drift import Drift, Windows, load_champion
from feature_jobs.metrics import Metrics
from gateway.contracts import tables
from gateway.contracts.drift import STEP_MS, WINDOW_MS, WINDOW_ROWS_MIN
from gateway.contracts.reference import DAY_MS, MEASURE_INDEX, MEASURES, Reference
from gateway.contracts.settings import Settings
from tests.factories_drift import AMOUNT, START_MS, make_quiet, make_receipts, make_trained, place_champion

LIVE_MS = START_MS + 21 * DAY_MS + 12 * 3_600_000
RATE = 40
COUNTS = [MEASURE_INDEX["card_count_24h"]]


@pytest.fixture(scope="module")
def trained() -> Reference:
    return make_trained()


@pytest.fixture
def local(tmp_path: Path, trained: Reference) -> Settings:
    settings = Settings(home=str(tmp_path))
    place_champion(settings.models_path, trained)
    return settings


def minutes(first: int, count: int, *, shifted: bool = False, seed: int = 1, rate: int = RATE, **more: Any) -> pa.Table:
    """Receipts of `count` minutes from minute `first` on; `shifted`: amounts are twenty times as large."""
    rng = np.random.default_rng([seed, first])
    t = np.sort(rng.integers(0, count * STEP_MS, count * rate)) + LIVE_MS + first * STEP_MS
    features = make_quiet(t, seed + first)
    if shifted:
        features[:, AMOUNT] *= 20
    return make_receipts(t, features, name=f"m{first}-{seed}", **more)


def commit(settings: Settings, receipts: pa.Table) -> None:
    write_deltalake(tables.table_uri(settings.tables, tables.DECISIONS), receipts, mode="append", schema_mode="merge")


def rows_of(settings: Settings) -> list[dict[str, Any]]:
    try:
        held = DeltaTable(tables.table_uri(settings.tables, tables.DRIFT)).to_pyarrow_table()
    except TableNotFoundError:
        return []
    rows: list[dict[str, Any]] = held.sort_by([("window_end_ms", "ascending"), ("measure", "ascending")]).to_pylist()
    return rows


def test_quiet_receipts_give_a_row_a_measure_and_ten_minutes_and_no_alarm(local: Settings) -> None:
    for first in range(0, 42, 2):
        commit(local, minutes(first, 2))
    metrics = Metrics()
    assert Drift(local, metrics).follow() == 21
    rows = rows_of(local)
    assert sorted({r["window_end_ms"] for r in rows}) == [LIVE_MS + k * WINDOW_MS for k in range(1, 5)]
    assert len(rows) == 4 * len(MEASURES)
    assert {r["measure"] for r in rows} == set(MEASURES)
    assert not any(r["alarm"] for r in rows)
    assert {r["rows"] for r in rows} == {10 * RATE}
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_psi", {"measure": "amount_minor"}) is not None
    # One a minute from the first that has 20 rows.
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_windows_total") == 41


def test_a_shift_of_one_feature_alarms_within_ten_minutes_of_stream_time(local: Settings) -> None:
    metrics = Metrics()
    follower = Drift(local, metrics)
    for first in range(25):
        commit(local, minutes(first, 1))
    follower.follow()
    assert not any(r["alarm"] for r in rows_of(local))
    for first in range(25, 36):
        commit(local, minutes(first, 1, shifted=True))
        follower.follow()
    alarms = [r for r in rows_of(local) if r["alarm"]]
    assert {r["measure"] for r in alarms} == {"amount_minor"}
    assert alarms[0]["window_end_ms"] <= LIVE_MS + 25 * STEP_MS + WINDOW_MS
    assert alarms[0]["psi"] > alarms[0]["threshold"]
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_alarm", {"measure": "amount_minor"}) == 1
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_alarms_total", {"measure": "amount_minor"}) == 1


@pytest.mark.parametrize("stops", [(3,), (1, 2, 3, 4, 5, 6, 7, 8, 9), (17, 18)])
def test_stopped_anywhere_it_goes_on_as_if_it_had_not_been(local: Settings, stops: tuple[int, ...], tmp_path: Path) -> None:
    parts = [minutes(first, 2, shifted=first >= 28) for first in range(0, 44, 2)]
    for part in parts:
        commit(local, part)
    Drift(local, Metrics()).follow()
    through = rows_of(local)
    shutil.rmtree(tables.table_uri(local.tables, tables.DRIFT))
    follower, read = Drift(local, Metrics()), 0
    for stop in stops:
        # Reads on to commit `stop`, then is gone without a word.
        while read < stop:
            read += follower.follow(1)
        follower = Drift(local, Metrics())
    follower.follow(200)
    assert rows_of(local) == through
    assert any(r["alarm"] for r in through)


def test_what_was_read_is_not_read_again_and_an_empty_look_writes_nothing(local: Settings) -> None:
    for first in range(0, 24, 2):
        commit(local, minutes(first, 2))
    follower = Drift(local, Metrics())
    assert follower.follow() == 12
    version = DeltaTable(tables.table_uri(local.tables, tables.DRIFT)).version()
    assert follower.follow() == 0
    Drift(local, Metrics()).follow()
    assert DeltaTable(tables.table_uri(local.tables, tables.DRIFT)).version() == version


def test_a_write_that_fails_is_made_up_for(local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(0, 24, 2):
        commit(local, minutes(first, 2))
    follower = Drift(local, Metrics())

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(drift_module, "write_deltalake", full)
        with pytest.raises(OSError, match="no space"):
            follower.follow()
    follower.follow()
    assert sorted({r["window_end_ms"] for r in rows_of(local)}) == [LIVE_MS + WINDOW_MS, LIVE_MS + 2 * WINDOW_MS]


def test_without_a_champion_or_its_reference_receipts_pass_by(tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    metrics = Metrics()
    follower = Drift(settings, metrics)
    assert follower.follow() == 0, "there is no table yet"
    commit(settings, minutes(0, 25))
    assert follower.follow() == 1
    assert rows_of(settings) == []
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_reference") == 0


def test_a_champion_that_comes_later_is_compared_with_from_then_on(tmp_path: Path, trained: Reference) -> None:
    settings = Settings(home=str(tmp_path))
    follower = Drift(settings, Metrics())
    commit(settings, minutes(0, 15))
    follower.follow()
    place_champion(settings.models_path, trained)
    commit(settings, minutes(15, 16))
    follower.follow()
    rows = rows_of(settings)
    assert {r["window_end_ms"] for r in rows} == {LIVE_MS + 2 * WINDOW_MS, LIVE_MS + 3 * WINDOW_MS}
    assert {r["rows"] for r in rows if r["window_end_ms"] == LIVE_MS + 3 * WINDOW_MS} == {10 * RATE}


def test_one_clock_that_is_far_ahead_closes_nobodys_windows(local: Settings) -> None:
    ahead = minutes(600, 1, rate=1, seed=9)
    for first in range(0, 24, 2):
        commit(local, pa.concat_tables([minutes(first, 2, rate=100), ahead] if first == 4 else [minutes(first, 2, rate=100)]))
    metrics = Metrics()
    Drift(local, metrics).follow()
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_late_total") == 0
    assert {r["rows"] for r in rows_of(local)} == {1000}


def test_receipts_behind_the_open_windows_are_counted_as_late(local: Settings) -> None:
    commit(local, minutes(0, 30))
    commit(local, minutes(2, 1, seed=3))
    metrics = Metrics()
    Drift(local, metrics).follow()
    assert metrics.registry.get_sample_value("fraudgate_jobs_drift_late_total") == RATE


def test_features_that_an_answer_had_to_do_without_are_no_drift(local: Settings) -> None:
    parts = [minutes(first, 1) for first in range(12)]
    lost = make_quiet(parts[5]["event_time_ms"].to_numpy())
    lost[:, 8:] = np.nan
    parts[5] = make_receipts(parts[5]["event_time_ms"].to_numpy(), lost, name="lost", degraded="request_only")
    for part in parts:
        commit(local, part)
    Drift(local, Metrics()).follow()
    rows = {r["measure"]: r for r in rows_of(local)}
    assert rows["card_count_24h"]["rows"] == 9 * RATE
    assert rows["risk_score"]["rows"] == 10 * RATE
    assert not any(r["alarm"] for r in rows.values())


def test_scores_of_another_model_are_not_compared_with_the_champions(local: Settings) -> None:
    for first in range(12):
        commit(local, minutes(first, 1, digest="d1" if first % 2 else "other"))
    Drift(local, Metrics()).follow()
    rows = {r["measure"]: r["rows"] for r in rows_of(local)}
    assert (rows["risk_score"], rows["decision"], rows["amount_minor"]) == (5 * RATE, 5 * RATE, 10 * RATE)


def test_scores_that_shift_alarm_as_score_and_as_decisions(local: Settings) -> None:
    for first in range(12):
        part = minutes(first, 1)
        commit(
            local,
            make_receipts(
                part["event_time_ms"].to_numpy(), make_quiet(part["event_time_ms"].to_numpy(), first), np.full(RATE, 0.9)
            ),
        )
    Drift(local, Metrics()).follow()
    assert {r["measure"] for r in rows_of(local) if r["alarm"]} == {"risk_score", "score_band", "decision"}


def test_of_a_busy_minute_a_sample_is_taken_that_depends_on_the_ids_alone(local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_module, "ROWS_A_MINUTE_MAX", 50)
    champion = load_champion(local)
    assert champion is not None
    whole = minutes(0, 11, rate=120)
    one, many = Windows(champion), Windows(champion)
    seen = [list(one.add(whole, 0)), [s for i in range(0, whole.num_rows, 100) for s in many.add(whole.slice(i, 100), i)]]
    last = [s[-1].window for s in seen]
    assert last[0].rows.max() == 10 * 50
    assert np.array_equal(last[0].psi, last[1].psi)
    assert WINDOW_ROWS_MIN < 50


def test_receipts_of_other_features_are_left_out(local: Settings) -> None:
    for first in range(12):
        part = minutes(first, 1)
        if first == 3:
            part = part.set_column(part.column_names.index("feature_fingerprint"), "feature_fingerprint", pa.array(["x"] * RATE))
        commit(local, part)
    Drift(local, Metrics()).follow()
    assert {r["rows"] for r in rows_of(local)} == {9 * RATE}
    assert not any(r["alarm"] for r in rows_of(local))
