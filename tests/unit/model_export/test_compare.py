"""`fraudgate compare` on tables with real models: paired scores, truth covered, verdicts, and what it says when something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gateway.contracts.settings import Settings
from model_export import live
from model_export.compare import Comparison, NoModelError, compare, share
from model_export.compare_commands import as_html, as_text, compare_command
from model_export.errors import PackageRefusedError
from model_export.live import NoReceiptsError
from model_export.offpolicy import Interval
from model_export.verdict import BETTER, OPEN, WORSE, Costs
from tests.factories_compare import DAY_MS, DECLINE, Written, make_two_models, write_receipts


@pytest.fixture(scope="module")
def settings_with_models(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = Settings(home=str(tmp_path_factory.mktemp("compare")))
    make_two_models(settings)
    return settings


@pytest.fixture(scope="module")
def written(settings_with_models: Settings) -> Written:
    return write_receipts(settings_with_models)


@pytest.fixture(scope="module")
def found(settings_with_models: Settings, written: Written) -> Comparison:
    return compare(settings_with_models)


def covers(interval: Interval, truth: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= truth <= interval.high


def test_each_receipt_has_both_models_scores_and_the_logged_one_comes_out_again(found: Comparison, written: Written) -> None:
    assert found.receipts == len(written.is_fraud)
    assert (found.shift.recomputed, found.shift.largest_difference) == (found.receipts, 0)
    assert found.shift.psi > 0.1
    table = np.zeros((4, 4), np.int64)
    np.add.at(table, (written.champion, written.challenger), 1)
    assert found.differing == table.tolist()
    assert found.decisions_differ == int((written.champion != written.challenger).sum())


def test_payments_whose_labels_are_still_to_come_are_not_counted_as_genuine(found: Comparison, written: Written) -> None:
    mature = written.event_time_ms < found.as_of_ms - 7 * DAY_MS
    assert found.matured == int(mature.sum()) < found.receipts
    assert found.explored == int((written.explored & mature).sum())


def test_precision_recall_and_money_of_both_models_cover_the_truth(found: Comparison, written: Written) -> None:
    mature = written.event_time_ms < found.as_of_ms - 7 * DAY_MS
    fraud, amount = written.is_fraud[mature], written.amount_minor[mature]
    for side, outcome in ((found.champion_side, written.champion[mature]), (found.challenger_side, written.challenger[mature])):
        flagged = outcome == DECLINE
        seen = side.worth["decline"]
        assert seen.flagged == int(flagged.sum())
        assert covers(seen.precision, fraud[flagged].mean())
        assert covers(seen.recall, (fraud & flagged).sum() / fraud.sum())
        assert covers(seen.fraud_stopped_minor, amount[fraud & flagged].sum())
        assert not covers(side.naive["decline"].recall, (fraud & flagged).sum() / fraud.sum())
        assert covers(side.cost_minor, Costs().of(outcome, amount, fraud).sum())


def test_a_better_challenger_is_found_and_the_other_way_round_a_worse_one(tmp_path: Path, found: Comparison) -> None:
    assert found.verdict.verdict == BETTER
    assert found.verdict.saved_minor is not None
    assert found.verdict.saved_minor > 0
    swapped = Settings(home=str(tmp_path))
    make_two_models(swapped, weak="challenger")
    write_receipts(swapped)
    assert compare(swapped).verdict.verdict == WORSE


def test_two_equal_models_differ_in_nothing_and_nothing_is_decided(tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    make_two_models(settings, weak=None, alias="shadow-twin")
    write_receipts(settings, 5_000, alias="shadow-twin")
    same = compare(settings, alias="shadow-twin")
    assert (same.decisions_differ, same.shift.ks) == (0, 0)
    assert same.shift.recomputed == same.receipts
    assert same.shift.psi == pytest.approx(0, abs=1e-3)
    assert (same.verdict.verdict, same.verdict.labels_needed) == (OPEN, None)
    assert "lean to neither side" in as_text(same)


def test_tables_from_before_exploration_are_read_and_their_declines_said_to_be_out_of_reach(tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    make_two_models(settings)
    write_receipts(settings, 5_000, share=0.0, columns=False)
    old = compare(settings)
    seen = old.champion_side.worth["decline"]
    assert old.explored == 0
    assert seen.unreachable == seen.flagged > 0
    assert seen.precision.low is not None
    assert seen.precision.high is not None
    assert seen.precision.high - seen.precision.low > 0.9


def test_the_command_prints_text_json_and_writes_a_page_that_fetches_nothing(
    settings_with_models: Settings,
    written: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FRAUDGATE_HOME", settings_with_models.home)
    page = tmp_path / "compare.html"
    assert compare_command(["--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "verdict     challenger better" in said
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org/", "")
    assert compare_command(["--json", "--from", "2026-01-08", "--to", "2026-01-15"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert 0 < held["receipts"] < len(written.is_fraud)
    assert held["verdict"]["needed"] == 40


def test_what_is_missing_is_named_with_what_to_do(tmp_path: Path, settings_with_models: Settings) -> None:
    with pytest.raises(NoModelError, match="fraudgate pull"):
        compare(Settings(home=str(tmp_path)))
    with pytest.raises(NoModelError, match="has no shadow"):
        compare(settings_with_models, alias="shadow")
    alone = Settings(home=str(tmp_path / "b"), model_dir=str(settings_with_models.models_path))
    with pytest.raises(NoReceiptsError, match="fraudgate jobs"):
        compare(alone)


def test_a_model_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    make_two_models(settings)
    path = settings.models_path / "fraudgate-2" / "model.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(PackageRefusedError, match="not the file"):
        compare(settings)


@pytest.mark.parametrize(
    "argv", [["--challenger", "champion"], ["--challenger", "other"], ["--mature-days", "-1"], ["--review-stops", "2"]]
)
def test_options_that_make_no_sense_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_command(argv)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_share_has_an_interval_that_knows_small_numbers() -> None:
    none = share(0, 20)
    assert none.value == 0
    assert none.high == pytest.approx(0.168, abs=0.001)
    assert share(0, 0).value is None


def test_the_page_says_what_the_text_says(found: Comparison) -> None:
    assert "frauds let through" in as_html(found)
    assert as_html(found).count("<svg") == 2


def test_of_more_receipts_than_fit_the_newest_are_read_and_the_others_counted(
    settings_with_models: Settings, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "RECEIPTS_MAX", 1_000)
    newest = live.read_receipts(settings_with_models)
    assert (len(newest), newest.left_out) == (1_000, len(written.is_fraud) - 1_000)
    assert newest.event_time_ms[-1] == written.event_time_ms.max()
    assert newest.event_time_ms[0] == np.sort(written.event_time_ms)[-1_000]
