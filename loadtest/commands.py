"""`fraudgate simulate` and `fraudgate replay`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import load_settings
from gateway.contracts.transaction import encode_json
from loadtest.accounting import table
from loadtest.adapters import Dataset
from loadtest.encoding import json_encoder
from loadtest.events import LoadError, Source
from loadtest.pace import Pace
from loadtest.progress import Progress
from loadtest.run import LABELS_ALL, LABELS_DUE, LABELS_NONE, WAIT_S_DEFAULT, Load, RunReport, Simulation, run_load
from loadtest.simulator import PATTERNS, SimulatorConfig
from loadtest.simulator.config import SHARES_DEFAULT, START_MS_DEFAULT

LABELS_HELP = (
    "also send labels to the topic labels: 'due' (the default when the option is given bare) those that became known within the"
    " time sent, 'all' also those of later"
)


def _start_ms(text: str) -> int:
    return int(time.time() * 1000) if text == "now" else instant_ms(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    if name not in SHARES_DEFAULT:
        raise argparse.ArgumentTypeError(f"there is no pattern {name!r}; there are {', '.join(SHARES_DEFAULT)}")
    return name, _positive(share or "1")


def _add_pace(parser: argparse.ArgumentParser) -> None:
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=_positive, metavar="N", help="payments a second, open loop")
    pace.add_argument(
        "--speed", type=_positive, metavar="X", help="X times as fast as event time: 1 is real speed. Neither: as fast as possible"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("avro", "json"), default="avro", help="of the messages on Kafka (default avro)")
    parser.add_argument(
        "--labels", nargs="?", choices=(LABELS_DUE, LABELS_ALL), const=LABELS_DUE, default=LABELS_NONE, help=LABELS_HELP
    )
    parser.add_argument(
        "--wait-s",
        type=_positive,
        default=WAIT_S_DEFAULT,
        metavar="S",
        help=f"the longest wait for decisions after the last payment was sent, seconds (default {WAIT_S_DEFAULT:.0f})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the accounting and the senders' reports as JSON")


def simulate(argv: list[str]) -> int:
    """Exit status 0; 1 when a payment is unaccounted for or decided twice, or can't be sent."""
    parser = argparse.ArgumentParser(
        prog="fraudgate simulate",
        description="Generate seeded card transactions with fraud among them (docs/simulator.md). The same seed and options give"
        " the same bytes. Fraud patterns: " + ", ".join(p.name for p in PATTERNS) + ".",
    )
    parser.add_argument("--seed", type=_count, default=7, help="default 7")
    parser.add_argument("--events", type=_count, default=20_000, metavar="N", help="how many payments (default 20000)")
    parser.add_argument("--skip", type=_count, default=0, metavar="N", help="leave out the first N: they went another way before")
    parser.add_argument("--cards", type=_count, default=5_000, help="size of the population (default 5000)")
    parser.add_argument("--events-per-day", type=_count, default=10_000, metavar="N", help="of simulated time (default 10000)")
    parser.add_argument("--fraud-rate", type=float, default=0.015, metavar="X", help="share of fraud (default 0.015)")
    parser.add_argument(
        "--pattern", type=_share, action="append", metavar="NAME[=SHARE]", help="only these patterns, in these proportions"
    )
    parser.add_argument(
        "--start",
        type=_start_ms,
        default=START_MS_DEFAULT,
        metavar="TIME",
        help="first instant of simulated time: an ISO date or time, UTC, or 'now' (default 2026-01-05)",
    )
    parser.add_argument(
        "--to",
        default="kafka",
        metavar="kafka|http|both|FILE.jsonl",
        help="where to; both: half of the cards each; a file gets one JSON transaction a line, and FILE.labels.jsonl the labels"
        " with --labels (default kafka)",
    )
    parser.add_argument(
        "--history", action="store_true", help="send as history: features are built from it, nothing is decided (kafka only)"
    )
    parser.add_argument("--wait", action="store_true", help="wait for the decisions and account for every payment")
    _add_pace(parser)
    _add_common(parser)
    args = parser.parse_args(argv)
    if args.history and (args.wait or args.to != "kafka"):
        parser.error("--history goes to kafka, and there are no decisions to wait for")
    if args.wait and args.to.endswith(".jsonl"):
        parser.error("a file decides nothing: leave out --wait")
    if args.to not in ("kafka", "http", "both") and not args.to.endswith(".jsonl"):
        parser.error("--to is kafka, http, both or the name of a .jsonl file")
    try:
        config = SimulatorConfig(
            seed=args.seed,
            cards=args.cards,
            start_ms=args.start,
            events_per_day=args.events_per_day,
            fraud_rate=args.fraud_rate,
            shares=_shares(args.pattern),
        )
    except ValueError as exc:
        parser.error(str(exc))
    source = partial(Simulation, config, args.events, args.skip)
    if args.to.endswith(".jsonl"):
        return _write(source(), Path(args.to), args.events, args.labels)
    doors = ("http", "kafka") if args.to == "both" else (args.to,)
    return _run("simulate", args, source, args.events, doors, history=args.history, account=args.wait)


def replay(argv: list[str]) -> int:
    """Exit status 0; 1 when a payment is unaccounted for or decided twice, or can't be sent."""
    parser = argparse.ArgumentParser(
        prog="fraudgate replay",
        description="Send a public data set (docs/simulator.md names them; recognised by its columns) through Kafka or HTTP at a"
        " fixed rate or a multiple of its own speed, wait for the decisions and account for every row. Its fraud labels never"
        " enter a transaction.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.parquet")
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="DATE", help="first instant, inclusive (UTC)")
    parser.add_argument(
        "--to", dest="to_ms", type=instant_ms, metavar="DATE", help="last instant, exclusive: --to 2018-08-10 ends with 2018-08-09"
    )
    parser.add_argument("--through", choices=("kafka", "http"), default="kafka", help="the door (default kafka)")
    parser.add_argument(
        "--history", action="store_true", help="send as history: features are built from it, nothing is decided (kafka only)"
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="wait for the decisions and account for every row (the default, but for --history)",
    )
    _add_pace(parser)
    _add_common(parser)
    args = parser.parse_args(argv)
    if args.history and (args.wait or args.through != "kafka"):
        parser.error("--history goes through kafka, and there are no decisions to wait for")
    if args.from_ms is not None and args.to_ms is not None and args.from_ms >= args.to_ms:
        parser.error("--from must lie before --to")
    account = not args.history if args.wait is None else args.wait
    source = partial(Dataset, args.file, args.from_ms, args.to_ms)
    try:
        total = source().count()
    except LoadError as exc:
        print(f"fraudgate replay: {exc}", file=sys.stderr)
        return 1
    if total == 0:
        print("fraudgate replay: the file has no rows in this range", file=sys.stderr)
        return 1
    return _run("replay", args, source, total, (args.through,), history=args.history, account=account)


def _shares(given: list[tuple[str, float]] | None) -> dict[str, float]:
    if not given:
        return dict(SHARES_DEFAULT)
    total = sum(share for _, share in given)
    shares: dict[str, float] = {}
    for name, share in given:
        shares[name] = shares.get(name, 0.0) + share / total
    return shares


def _run(
    name: str,
    args: argparse.Namespace,
    source: Callable[[], Source],
    total: int,
    doors: tuple[str, ...],
    *,
    history: bool,
    account: bool,
) -> int:
    load = Load(
        source=source,
        total=total,
        doors=doors,
        pace=Pace(args.rate, args.speed),
        avro=args.format == "avro",
        history=history,
        labels=args.labels,
        account=account,
        wait_s=args.wait_s,
    )
    try:
        report = run_load(load, load_settings())
    except LoadError as exc:
        print(f"fraudgate {name}: {exc}", file=sys.stderr)
        return 1
    print(summary(report))
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(report_as_dict(report)), indent=2) + b"\n")
    undelivered = (report.kafka is not None and report.kafka.failed > 0) or (report.http is not None and report.http.failed > 0)
    return 1 if undelivered or (report.accounting is not None and not report.accounting.complete) else 0


def _write(source: Simulation, path: Path, total: int, labels: str) -> int:
    """Transactions, and labels when asked for, as lines of JSON."""
    encode_label = json_encoder()
    progress = Progress("written", total)
    label_path = path.with_suffix(".labels.jsonl")
    with path.open("wb") as out:
        last_ms = 0
        found = []
        for event in source.events():
            out.write(encode_json(event.transaction) + b"\n")
            last_ms = event.transaction.event_time_ms
            if labels != LABELS_NONE:
                found += source.labels_due(last_ms)
            progress.add(1)
    progress.close()
    if labels == LABELS_ALL:
        found += source.labels_remaining()
    if labels != LABELS_NONE:
        label_path.write_bytes(b"".join(encode_label(label) + b"\n" for label in found))
    print(f"{total} transactions in {path}" + (f", {len(found)} labels in {label_path}" if labels != LABELS_NONE else ""))
    return 0


def summary(report: RunReport) -> str:
    """What the senders did and what the accounting found, for people."""
    lines = []
    if report.kafka is not None:
        k = report.kafka
        lines.append(
            f"kafka: {k.sent} payments and {k.labels} labels sent, {k.failed} refused, {k.sent / max(k.took_s, 1e-9):.0f} a second"
        )
        if k.first_failure is not None:
            lines.append(f"kafka: first failure: {k.first_failure}")
        if k.punctuality.late:
            lines.append(
                f"kafka: behind its schedule with {k.punctuality.late} payments, by {k.punctuality.behind_max_s:.2f} s at most"
            )
    if report.http is not None:
        h = report.http
        statuses = ", ".join(f"{count} with status {status}" for status, count in sorted(h.statuses.items())) or "no answers"
        lines.append(
            f"http: {h.sent} payments sent, {statuses}, {h.retries} retries, {h.failed} without an answer,"
            f" {h.sent / max(h.took_s, 1e-9):.0f} a second"
        )
        lines += [f"http: refused as {reason}: {count}" for reason, count in sorted(h.refusals.items())]
        if h.latencies_s:
            answer = h.latency
            lines.append(
                f"http: answer after p50 {answer.p50_ms:.1f}, p99 {answer.p99_ms:.1f}, p99.9 {answer.p999_ms:.1f},"
                f" max {answer.max_ms:.1f} ms"
            )
        if h.punctuality.late:
            lines.append(
                f"http: behind its schedule with {h.punctuality.late} payments, by {h.punctuality.behind_max_s:.2f} s at most"
            )
    if report.accounting is not None:
        lines += ["", table(report.accounting)]
    return "\n".join(lines)


def report_as_dict(report: RunReport) -> dict[str, Any]:
    """The report as plain data; NaN becomes null."""
    out: dict[str, Any] = {"took_s": report.took_s}
    if report.accounting is not None:
        a = msgspec.to_builtins(report.accounting)
        a["unaccounted_ids"], a["duplicate_ids"] = a["unaccounted"], a["duplicates"]
        a["unaccounted"], a["duplicates"] = len(a["unaccounted_ids"]), len(a["duplicate_ids"])
        out["accounting"] = a
    if report.kafka is not None:
        out["kafka"] = msgspec.to_builtins(report.kafka)
    if report.http is not None:
        h = report.http
        out["http"] = {
            "sent": h.sent,
            "statuses": {str(status): count for status, count in h.statuses.items()},
            "refusals": dict(h.refusals),
            "retries": h.retries,
            "failed": h.failed,
            "took_s": h.took_s,
            "latency": msgspec.to_builtins(h.latency),
            "punctuality": msgspec.to_builtins(h.punctuality),
        }
    return out
