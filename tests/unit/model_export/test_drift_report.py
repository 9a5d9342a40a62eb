"""`fraudgate drift`: a day against the training rows, label rates as labels mature, and a page that fetches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from gateway.contracts import tables
from gateway.contracts.reference import MEASURES, Reference
from gateway.contracts.settings import Settings
from model_export.drift_commands import as_html, as_text, drift
from model_export.drift_report import DriftReport, NoReferenceError, label_days, report
from model_export.live import DAY_MS, NoReceiptsError
from tests.factories_drift import AMOUNT, START_MS, make_quiet, make_receipts, make_times, make_trained, place_champion

ROWS_A_DAY = 3_000
FIRST_DAY = START_MS + 28 * DAY_MS
DAYS = 21
LAST_DAY = FIRST_DAY + (DAYS - 1) * DAY_MS
DELAY_DAYS = 5


@pytest.fixture(scope="module")
def trained() -> Reference:
    return make_trained()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, trained: Reference) -> Settings:
    """Three weeks of receipts. On the last day amounts are three times as large. From day 10 on four times as many payments are fraud; the
    label of a fraud comes after up to five days."""
    made = Settings(home=str(tmp_path_factory.mktemp("drift")))
    place_champion(made.models_path, trained)
    ids, reported = [], []
    for day in range(DAYS):
        t = make_times(ROWS_A_DAY, 1, seed=50 + day, from_ms=FIRST_DAY + day * DAY_MS)
        features = make_quiet(t, 50 + day)
        if day == DAYS - 1:
            features[:, AMOUNT] *= 3
        name = f"day{day}"
        write_deltalake(
            tables.table_uri(made.tables, tables.DECISIONS),
            make_receipts(t, features, name=name),
            mode="append",
            schema_mode="merge",
        )
        rng = np.random.default_rng(day)
        for i in np.flatnonzero(rng.random(len(t)) < (0.01 if day < 10 else 0.04)).tolist():
            at = int(t[i] + rng.uniform(0, DELAY_DAYS) * DAY_MS)
            if at < LAST_DAY + DAY_MS:
                ids.append(f"{name}-{i}")
                reported.append(at)
    labels = pa.table({"transaction_id": ids, "is_fraud": [True] * len(ids), "reported_at_ms": pa.array(reported, pa.int64())})
    write_deltalake(tables.table_uri(made.tables, tables.LABELS), labels)
    return made


@pytest.fixture(scope="module")
def found(settings: Settings) -> DriftReport:
    return report(settings)


def test_the_newest_day_is_reported_and_the_feature_that_shifted_comes_first(found: DriftReport) -> None:
    assert found.day_ms == LAST_DAY
    assert (found.receipts, found.left_out) == (ROWS_A_DAY, 0)
    assert [m.measure for m in found.measures if m.alarm] == ["amount_minor"]
    assert found.measures[0].measure == "amount_minor"
    assert {m.measure for m in found.measures} == set(MEASURES)
    for m in found.measures:
        assert sum(m.expected) == pytest.approx(1)
        assert sum(m.observed) == pytest.approx(1)
        assert len(m.observed) == len(m.edges) + 2


def test_a_quiet_day_has_nothing_that_drifted(settings: Settings) -> None:
    quiet = report(settings, FIRST_DAY + 3 * DAY_MS)
    assert not any(m.alarm for m in quiet.measures)
    assert f"0 of {len(MEASURES)} measures drifted" in as_text(quiet)


def test_label_rates_rise_as_labels_mature_and_what_differs_from_training_is_said_of_mature_days_only(found: DriftReport) -> None:
    assert len(found.labels) == DAYS
    assert found.reference_label_rate == pytest.approx(0.01, abs=0.003)
    by_age = {(LAST_DAY - d.day_ms) // DAY_MS: d for d in found.labels}
    assert not any(d.differs for age, d in by_age.items() if age > 10)
    assert sum(d.differs for age, d in by_age.items() if 7 <= age <= 10) >= 3
    assert not by_age[0].mature
    assert by_age[12].mature
    young = by_age[1]
    assert young.known_share is not None
    assert young.known_share < 0.6
    assert young.expected_rate is not None
    assert young.rate.value is not None
    assert young.rate.value < 0.03 < young.expected_rate < 0.07


def test_labels_are_those_known_at_the_given_time(settings: Settings, found: DriftReport) -> None:
    early = label_days(settings, LAST_DAY, 0.01, as_of_ms=FIRST_DAY + 2 * DAY_MS)
    assert sum(d.frauds for d in early) < sum(d.frauds for d in found.labels[:3])
    assert not any(d.mature for d in early)


def test_outcomes_and_scores_are_told_hour_by_hour(found: DriftReport) -> None:
    assert sum(h.receipts for h in found.hours) == found.receipts
    for h in found.hours:
        assert sum(h.outcomes.values()) == pytest.approx(1)
        assert h.mean_score is not None
        assert 0 < h.mean_score < 100


def test_alarms_of_the_stream_on_that_day_are_listed(settings: Settings) -> None:
    row = {"window_end_ms": LAST_DAY + 3_600_000, "measure": "amount_minor", "psi": 1.5, "alarm": True}
    other = row | {"window_end_ms": LAST_DAY - 1}
    quiet = row | {"measure": "mcc", "alarm": False}
    write_deltalake(tables.table_uri(settings.tables, tables.DRIFT), pa.Table.from_pylist([row, other, quiet]), mode="overwrite")
    assert [(a.window_end_ms, a.measure) for a in report(settings).alarms] == [(LAST_DAY + 3_600_000, "amount_minor")]


def test_the_command_prints_text_json_and_writes_a_page_that_fetches_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAUDGATE_HOME", settings.home)
    page = tmp_path / "drift.html"
    assert drift(["--day", "2026-02-20", "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("day         2026-02-20 (UTC), 3,000 receipts")
    assert "labels still come" in said
    text = page.read_text()
    assert text.count("<svg") == 3
    for outside in ("http", "src=", "@import", "url("):
        assert outside not in text.replace("http://www.w3.org/", "").replace("url(#", ""), outside
    assert drift(["--json", "--day", "2026-02-20"]) == 0
    assert json.loads(capsys.readouterr().out)["measures"][0]["rows"] > 0


def test_the_same_report_makes_the_same_page(found: DriftReport) -> None:
    assert as_html(found) == as_html(found)


def test_what_is_missing_is_named_with_what_to_do(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(NoReferenceError, match="fraudgate pull"):
        report(Settings(home=str(tmp_path)))
    with pytest.raises(NoReceiptsError, match="fraudgate jobs"):
        report(Settings(home=str(tmp_path), model_dir=str(settings.models_path)))
    with pytest.raises(NoReceiptsError, match="none of 0 receipts"):
        report(settings, LAST_DAY + 40 * DAY_MS)


def test_a_damaged_reference_is_refused(trained: Reference, tmp_path: Path) -> None:
    made = Settings(home=str(tmp_path))
    place_champion(made.models_path, trained)
    (made.models_path / "fraudgate-1" / "reference.npz").write_bytes(b"PK")
    with pytest.raises(NoReferenceError, match="can't be read"):
        report(made)
