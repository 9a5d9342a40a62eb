"""`fraudgate backtest`: what a changed policy would have done with the past, before it does it to the present."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from deploy.evaluate import files_of
from deploy.history.backtest import compare
from deploy.history.backtest_public import PublicHistory
from deploy.history.backtest_report import Report, as_html, as_json, as_text
from deploy.history.backtest_rows import DeltaHistory, NoHistoryError
from deploy.history.list_books import ListBooks, read_books
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import Settings, load_settings
from gateway.errors import PolicyRefusedError
from gateway.policy import load_policy
from loadtest.events import LoadError
from model_export import pages
from model_export.cost import CostModel

# A label that was to come has come by then, as for the training set.
MATURE_DAYS = 7


def backtest(argv: list[str]) -> int:
    """Exit status 0; 1 when there is nothing to replay or a policy is refused."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.mature_days < 0:
        parser.error("--mature-days can't be negative")
    try:
        costs = CostModel(**{f.name: getattr(options, f.name) for f in dataclasses.fields(CostModel)})
    except ValueError as exc:
        parser.error(str(exc))

    def say(line: str) -> None:
        print(f"{line} ...", file=sys.stderr, flush=True)

    try:
        report = run(load_settings(), options, costs, say)
        if options.html is not None:
            pages.write(options.html, as_html(report))
    except (NoHistoryError, PolicyRefusedError, LoadError, OSError) as exc:
        print(f"fraudgate backtest: {exc}", file=sys.stderr)
        return 1
    print(as_json(report) if options.json else as_text(report))
    return 0


def run(settings: Settings, options: argparse.Namespace, costs: CostModel, say: Callable[[str], object]) -> Report:
    """Raises `NoHistoryError`, `PolicyRefusedError` and `LoadError`."""
    new = load_policy(str(options.policy_new))
    current = load_policy(settings.policy_path if options.policy is None else str(options.policy))
    if options.data:
        threads = len(os.sched_getaffinity(0))
        public = PublicHistory(files_of(options.data), options.from_ms, options.to_ms, threads, say)
        found = compare(current, new, public.parts(), ListBooks([]), costs)
        return Report(found, dict(public.left_out), "the data's end", public=True)
    as_of_ms = time.time_ns() // 1_000_000 if options.labels_as_of_ms is None else options.labels_as_of_ms
    history = DeltaHistory(settings, options.from_ms, options.to_ms, as_of_ms, options.mature_days)
    found = compare(current, new, history.parts(), read_books(settings), costs)
    if not found.payments:
        raise NoHistoryError("none of the receipts of that time can be replayed: " + "; ".join(history.left_out))
    return Report(found, dict(history.left_out), f"{datetime.fromtimestamp(as_of_ms / 1000, UTC):%Y-%m-%d %H:%M}", public=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fraudgate backtest",
        description="Decide the past again by another policy and by the current one: features, scores and lists as they were, labels as"
        " they are known. docs/backtest.md explains each figure.",
    )
    parser.add_argument("policy_new", type=Path, metavar="POLICY_NEW", help="the folder of the policy to try")
    parser.add_argument("--policy", type=Path, metavar="FOLDER", help="what it is compared with (default: the setting policy_path)")
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="MS|DATE", help="first event time (default: all)")
    parser.add_argument("--to", dest="to_ms", type=instant_ms, metavar="MS|DATE", help="end, not in it (default: all)")
    parser.add_argument(
        "--labels-as-of",
        dest="labels_as_of_ms",
        type=instant_ms,
        metavar="MS|DATE",
        help="only labels that had been reported by then (default: now)",
    )
    parser.add_argument(
        "--mature-days",
        type=int,
        default=MATURE_DAYS,
        metavar="N",
        help="younger payments without a known fraud count as unknown, not as genuine (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        metavar="FILE",
        help="replay a public data set (a Parquet file, or a folder of the handbook's) instead of receipts; default time: its last month",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    for field in dataclasses.fields(CostModel):
        value = getattr(CostModel(), field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(value),
            default=value,
            metavar="X",
            help=f"cost model; money in minor units (default: {value:g})",
        )
    return parser
