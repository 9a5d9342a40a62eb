"""`fraudgate evaluate`: models on the pipeline's own features against published figures, on a public data set.

The features come from the feature jobs' backfill, the models and metrics from model_export; neither knows the other. Two months of the
handbook's data take about a minute to compute, a model of a week some seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from deploy.public_data import PublicData, read_public
from feature_jobs.handbook import handbook_features
from feature_jobs.training_set import codes_of, features_between
from gateway.contracts.decision import RISK_SCORE_MAX
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.instants import instant_ms
from loadtest.adapters import ADAPTERS
from loadtest.events import LoadError
from model_export.benchmark import DAY_MS, WEEK_DAYS, Payments, Ranking, date_of
from model_export.cost import BandThresholds, CostModel, cost_of, thresholds
from model_export.evaluate import PUBLISHED_BEST_MEAN, PUBLISHED_ONE_WEEK, Evaluation, Tested, weeks_of
from model_export.evaluation_plots import evaluation_plots
from model_export.metrics import calibration

# The published test week.
TEST_FROM = "2018-08-08"
TRAIN_DAYS = (7, 28)
WEEKS = 4
HANDBOOK = "handbook"
HANDBOOK_COLUMNS = next(a.columns for a in ADAPTERS if a.name == HANDBOOK)


@dataclass(frozen=True)
class Row:
    """A line of the table: one model, its ranking on the named week, and mean and population deviation over all weeks."""

    model: str
    week: Ranking
    mean: Ranking
    spread: Ranking
    weeks: list[str]
    recipe: str


@dataclass(frozen=True)
class Money:
    """Thresholds chosen on earlier weeks, and what deciding by them costs in the last one, minor units."""

    chosen_on: list[str]
    measured_on: str
    bands: list[BandThresholds]
    cost: float
    cost_of_approving_all: float


@dataclass(frozen=True)
class Report:
    data: str
    payments: int
    frauds: int
    test_from: str
    rows: list[Row]
    calibration: dict[str, float]
    money: Money | None


def evaluate(argv: list[str]) -> int:
    """Exit status 0, or 1 with a message when the data don't allow it."""
    parser = argparse.ArgumentParser(
        prog="fraudgate evaluate",
        description="Train and test on a public data set by the published split and metrics, with the pipeline's own features.",
    )
    parser.add_argument(
        "--data", type=Path, action="append", required=True, metavar="FILE", help="a Parquet file, or a folder of such"
    )
    parser.add_argument(
        "--test-from",
        type=instant_ms,
        metavar="DATE",
        help=f"first day of the test week (default: {TEST_FROM}; of other data: the newest)",
    )
    parser.add_argument(
        "--train-days", type=int, nargs="+", default=list(TRAIN_DAYS), metavar="N", help="days of training (default: 7 28)"
    )
    parser.add_argument("--weeks", type=int, default=WEEKS, help="test weeks for mean and spread (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"), help="folder for the plots (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON: auc, ap, cp100 of each model")
    options = parser.parse_args(argv)
    if not 1 <= options.weeks <= 26 or any(not 1 <= days <= 365 for days in options.train_days):
        parser.error("--weeks must lie in 1..26 and --train-days in 1..365")

    def say(line: str) -> None:
        print(f"{line} ...", file=sys.stderr, flush=True)

    try:
        report, best = run(files_of(options.data), options.test_from, options.train_days, options.weeks, say)
    except (LoadError, ValueError) as exc:
        print(f"fraudgate evaluate: {exc}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in best.items():
        (options.out / name).write_bytes(content)
    print(as_json(report) if options.json else as_text(report))
    say(f"plots: {', '.join(str(options.out / name) for name in best)}")
    return 0


def run(
    paths: Sequence[Path],
    test_from_ms: int | None,
    train_days: Sequence[int],
    weeks: int,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[Report, dict[str, bytes]]:
    """The report, and the plots of the last model by file name. Raises `LoadError` and ValueError."""
    say("reading")
    data = read_public(paths)
    t_ms = data.silver["event_time_ms"].to_numpy()
    payments = Payments(t_ms // DAY_MS, codes_of(data.silver["customer_id"])[0], data.is_fraud)
    first_day, end_day = int(payments.day[0]), int(payments.day[-1]) + 1
    test_day = _test_day(data.name, test_from_ms, end_day)
    say(f"computing {len(FEATURE_NAMES)} features of {len(t_ms)} payments")
    ours = Evaluation(payments, features_of(data))
    rows = []
    tested: list[Tested] = []
    if data.name == HANDBOOK:
        say("training as published")
        book = Evaluation(payments, handbook_features(data.silver, data.labels).astype(np.float32))
        rows += [
            _row(
                "the book's 15 features, XGBoost as published",
                [book.published(week) for week in _weeks(book, test_day, 7, weeks)],
                test_day,
            )
        ]
    for days in train_days:
        say(f"training on {days} days")
        tested = [ours.ours(week, days) for week in _weeks(ours, test_day, days, weeks)]
        rows.append(_row(f"fraudgate, {days} days of training", tested, test_day))
    amount = data.silver["amount_minor"].to_numpy()
    named = _at(tested, test_day)
    fraud = data.is_fraud[named.fold.test]
    money = _money(tested, payments, amount)
    report = Report(
        data=f"{data.name}, {date_of(first_day)} to {date_of(end_day - 1)}",
        payments=len(t_ms),
        frauds=int(data.is_fraud.sum()),
        test_from=date_of(test_day),
        rows=rows,
        calibration=calibration(fraud, named.probability),
        money=money,
    )
    return report, evaluation_plots(fraud, named.probability, None if money is None else money.bands)


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files, and those of the handbook's transactions in each folder, by name. Raises `LoadError` when there are none."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in sorted(path.glob("*.parquet")) if set(pq.read_schema(p).names).issuperset(HANDBOOK_COLUMNS)]
        if not inside:
            raise LoadError(f"{path} holds no file of the {HANDBOOK}'s transactions")
        files += inside
    return files


def features_of(data: PublicData) -> npt.NDArray[np.float32]:
    """(rows, features) of the contract, as the backfill computes them."""
    t_ms = data.silver["event_time_ms"]
    table = features_between(data.silver, data.labels, int(t_ms[0].as_py()), int(t_ms[-1].as_py()) + 1)
    out = np.empty((table.num_rows, len(FEATURE_NAMES)), np.float32)
    for i, name in enumerate(FEATURE_NAMES):
        out[:, i] = table[name].to_numpy()
    return out


def _test_day(name: str, test_from_ms: int | None, end_day: int) -> int:
    if test_from_ms is not None:
        return test_from_ms // DAY_MS
    return instant_ms(TEST_FROM) // DAY_MS if name == HANDBOOK else end_day - WEEK_DAYS


def _weeks(evaluation: Evaluation, test_day: int, train_days: int, count: int) -> list[int]:
    """Raises ValueError unless the week from `test_day` is among them."""
    first_day, end_day = int(evaluation.payments.day[0]), int(evaluation.payments.day[-1]) + 1
    weeks = weeks_of(first_day, end_day, test_day, train_days, count)
    if test_day not in weeks:
        raise ValueError(
            f"the data, {date_of(first_day)} to {date_of(end_day - 1)}, don't hold the test week from {date_of(test_day)} with "
            f"{train_days} days of training and its validation weeks before it"
        )
    return weeks


def _at(tested: list[Tested], test_day: int) -> Tested:
    return next(t for t in tested if t.fold.test_day == test_day)


def _row(model: str, tested: list[Tested], test_day: int) -> Row:
    found = np.array([[t.ranking.auc, t.ranking.ap, t.ranking.cp100] for t in tested])
    recipe = _at(tested, test_day).recipe
    return Row(
        model=model,
        week=_at(tested, test_day).ranking,
        mean=Ranking(*found.mean(axis=0).tolist()),
        spread=Ranking(*found.std(axis=0).tolist()),
        weeks=[date_of(t.fold.test_day) for t in tested],
        recipe="" if recipe is None else f"{recipe.candidate}, {recipe.rounds} rounds, validation AP {recipe.validation_ap:.4f}",
    )


def risk_scores(probability: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """contracts.decision.risk_score of each."""
    return np.minimum(RISK_SCORE_MAX, (probability.astype(np.float64) * RISK_SCORE_MAX + 0.5).astype(np.int64))


def _money(tested: list[Tested], payments: Payments, amount: npt.NDArray[np.int64]) -> Money | None:
    """Thresholds for the last week from those whose labels were known when it began; None when there is no such week."""
    last = tested[-1]
    known = [t for t in tested if t.fold.test_day + 2 * WEEK_DAYS <= last.fold.test_day]
    if not known:
        return None
    costs = CostModel()
    rows = np.concatenate([t.fold.test for t in known])
    chosen = thresholds(amount[rows], payments.is_fraud[rows], risk_scores(np.concatenate([t.probability for t in known])), costs)
    amount, fraud = amount[last.fold.test], payments.is_fraud[last.fold.test]
    return Money(
        chosen_on=[date_of(t.fold.test_day) for t in known],
        measured_on=date_of(last.fold.test_day),
        bands=chosen,
        cost=cost_of(amount, fraud, risk_scores(last.probability), costs, chosen),
        cost_of_approving_all=float(costs.of_approving(amount, fraud).sum()),
    )


def as_json(report: Report) -> str:
    """auc, ap, cp100 of each model, for the named week, and mean and spread over the weeks."""
    models = {
        row.model: asdict(row.week)
        | {
            "mean": asdict(row.mean),
            "spread": asdict(row.spread),
            "weeks": row.weeks,
            "recipe": row.recipe,
        }
        for row in report.rows
    }
    out = {
        "data": report.data,
        "payments": report.payments,
        "frauds": report.frauds,
        "test_from": report.test_from,
        "feature_fingerprint": FINGERPRINT,
        "published": {"xgboost_one_week": asdict(PUBLISHED_ONE_WEEK), "best_mean": asdict(PUBLISHED_BEST_MEAN)},
        "models": models,
        "calibration": report.calibration,
        "money": report.money and asdict(report.money),
    }
    return json.dumps(out, indent=2, default=lambda v: v.tolist())


def as_text(report: Report) -> str:
    lines = [
        f"{report.data}: {report.payments} payments, {report.frauds} frauds",
        "",
        f"{'test week from ' + report.test_from:<48}{'AUC ROC':>9}{'AP':>9}{'CP@100':>9}   mean of the weeks (deviation)",
    ]
    if any("published" in row.model for row in report.rows):
        for name, r in (
            ("published: XGBoost, one week of training", PUBLISHED_ONE_WEEK),
            ("published: best in the book, four weeks' mean", PUBLISHED_BEST_MEAN),
        ):
            lines.append(f"{name:<48}{r.auc:>9.3f}{r.ap:>9.3f}{r.cp100:>9.3f}")
    for row in report.rows:
        w, m, s = row.week, row.mean, row.spread
        lines.append(
            f"{row.model:<48}{w.auc:>9.4f}{w.ap:>9.4f}{w.cp100:>9.4f}   "
            f"{m.auc:.4f} ({s.auc:.4f}) {m.ap:.4f} ({s.ap:.4f}) {m.cp100:.4f} ({s.cp100:.4f})"
        )
    lines += [""] + [
        f"{row.model}: test weeks from {', '.join(row.weeks)}" + (f"; {row.recipe}" if row.recipe else "") for row in report.rows
    ]
    c = report.calibration
    lines += [
        "",
        f"calibration on that week: mean probability {c['mean_probability']:.5f}, share of frauds {c['fraud_rate']:.5f}, expected error "
        f"{c['expected_calibration_error']:.5f}, slope {c['slope']:.3f}, Brier score {c['brier']:.5f} "
        f"(of the bare rate {c['brier_of_rate']:.5f})",
    ]
    if report.money is not None:
        lines += ["", *_money_text(report.money)]
    return "\n".join(lines)


def _money_text(money: Money) -> list[str]:
    lines = [f"thresholds of the least cost, chosen on the weeks from {', '.join(money.chosen_on)} (assumptions: {CostModel()})"]
    lines.append(
        f"{'amounts up to':>16}{'payments':>10}{'frauds':>8}{'review from':>13}{'decline from':>14}{'cost':>12}{'approving all':>15}"
    )
    for b in money.bands:
        upto = "any" if b.up_to_minor is None else f"{b.up_to_minor / 100:.2f}"
        lines.append(
            f"{upto:>16}{b.payments:>10}{b.frauds:>8}{b.review:>13}{b.decline:>14}"
            f"{b.cost / 100:>12.2f}{b.cost_of_approving_all / 100:>15.2f}"
        )
    saved = 1 - money.cost / money.cost_of_approving_all if money.cost_of_approving_all else 0.0
    lines.append(
        f"in the week from {money.measured_on} they cost {money.cost / 100:.2f}, approving all {money.cost_of_approving_all / 100:.2f}: "
        f"{saved:.1%} less"
    )
    return lines
