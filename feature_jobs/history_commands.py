"""`fraudgate training-set` and `fraudgate backfill`: the offline engine over the Delta tables. Neither needs Spark."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from feature_jobs.backfill import OtherFeaturesError
from feature_jobs.backfill import backfill as backfill_features
from feature_jobs.training_set import LABEL_DELAY_DAYS, NoHistoryError, write_training_set
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import load_settings


def training_set(argv: list[str]) -> int:
    """Write a version of the training set from silver and labels. Exit status 1 when there is nothing to make one of."""
    parser = argparse.ArgumentParser(
        "fraudgate training-set", description="Write features and labels of past transactions as a version of a Delta table."
    )
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="MS|DATE", help="oldest transaction (default: all)")
    parser.add_argument("--to", dest="to_ms", type=instant_ms, metavar="MS|DATE", help="end, not in it (default: what has matured)")
    parser.add_argument(
        "--as-of",
        dest="as_of_ms",
        type=instant_ms,
        metavar="MS|DATE",
        help="only labels known by then (default: newest event time)",
    )
    parser.add_argument(
        "--label-delay-days",
        type=int,
        default=LABEL_DELAY_DAYS,
        metavar="N",
        help="leave out transactions younger than this at the as-of time: their labels are still to come (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.label_delay_days < 0:
        parser.error("--label-delay-days can't be negative")
    try:
        written = write_training_set(
            load_settings(),
            from_ms=options.from_ms,
            to_ms=options.to_ms,
            as_of_ms=options.as_of_ms,
            label_delay_days=options.label_delay_days,
        )
    except NoHistoryError as exc:
        print(f"fraudgate training-set: {exc}", file=sys.stderr)
        return 1
    days = f"{_day(written.from_ms)} to {_day(written.to_ms)}, labels as of {_day(written.as_of_ms)}"
    print(f"training set version {written.version}: {written.rows} rows, {written.frauds} frauds, {days}")
    return 0


def backfill(argv: list[str]) -> int:
    """Write features of a past period to the table `features`. Exit status 1 when there is nothing to compute."""
    parser = argparse.ArgumentParser(
        "fraudgate backfill",
        description="Compute the features of past transactions from silver and write them to the table features.",
    )
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="MS|DATE", help="oldest transaction (default: all)")
    parser.add_argument("--to", dest="to_ms", type=instant_ms, metavar="MS|DATE", help="end, not in it (default: all)")
    options = parser.parse_args(argv)
    try:
        written = backfill_features(load_settings(), from_ms=options.from_ms, to_ms=options.to_ms)
    except (NoHistoryError, OtherFeaturesError) as exc:
        print(f"fraudgate backfill: {exc}", file=sys.stderr)
        return 1
    days = f"{_day(written.from_ms)} to {_day(written.to_ms)}"
    print(f"features of {written.rows} transactions, {days}: version {written.version} of {written.uri}")
    return 0


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
