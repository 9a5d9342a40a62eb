"""`fraudgate parity`: the check once, as a table or JSON; or again and again on a sample of new receipts, as metrics."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from types import FrameType

from prometheus_client import start_http_server

from feature_jobs.metrics import ParityMetrics
from feature_jobs.parity import NoReceiptsError, Report, check_parity
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import Settings, load_settings

log = logging.getLogger(__name__)

LIVE_SAMPLE = 1_000
LIVE_EVERY_S = 300


def parity(argv: list[str]) -> int:
    """Exit status 0 when every compared value is equal, 1 when one differs or there is nothing to compare."""
    parser = argparse.ArgumentParser(
        "fraudgate parity",
        description="Recompute every feature of logged receipts from the Delta tables and compare it with what the model saw, to the bit.",
    )
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="MS|DATE", help="oldest event time (default: all)")
    parser.add_argument("--to", dest="to_ms", type=instant_ms, metavar="MS|DATE", help="end of event times, not in it")
    parser.add_argument(
        "--sample", type=int, metavar="N", help=f"compare N receipts drawn at random (--live: default {LIVE_SAMPLE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON: compared, equal, different, missing ...")
    parser.add_argument(
        "--live", action="store_true", help="check samples again and again, with metrics on FRAUDGATE_PARITY_PORT, until SIGTERM"
    )
    parser.add_argument(
        "--every", type=int, default=LIVE_EVERY_S, metavar="S", help="seconds between two samples (default %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.sample is not None and options.sample < 1:
        parser.error("--sample must be at least 1")
    if options.every < 1:
        parser.error("--every must be at least 1")
    settings = load_settings()
    if options.live:
        return live(settings, options.sample or LIVE_SAMPLE, options.every)
    started = time.monotonic()
    try:
        report = check_parity(settings, from_ms=options.from_ms, to_ms=options.to_ms, sample=options.sample, seed=options.seed)
    except NoReceiptsError as exc:
        print(f"fraudgate parity: {exc}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        print(table(report))
        print(f"{time.monotonic() - started:.1f} s")
    return 1 if report.different_values else 0


def table(report: Report) -> str:
    """What a person reads: a line a feature, then the sums."""
    lines = [f"{'feature':<34}{'compared':>12}{'equal':>12}{'different':>12}{'missing':>12}"]
    for name, equal in report.equal.items():
        lines.append(f"{name:<34}{report.rows:>12,}{equal:>12,}{report.different[name]:>12,}{report.missing_rows:>12,}")
    sums = (report.compared, sum(report.equal.values()), report.different_values, report.missing_rows * len(report.equal))
    lines.append(f"{'all values':<34}" + "".join(f"{n:>12,}" for n in sums))
    lines.append("")
    lines.append(
        f"{report.receipts:,} receipts: {report.rows:,} compared, {report.missing_rows:,} decided without features,"
        f" {report.stale_rows:,} flagged stale, {report.unverifiable_rows:,} whose past is not all logged"
    )
    lines.append(
        f"of the compared {report.late_rows:,} were observed late, and {report.recounted:,} entities were recounted one by one"
    )
    lines += [
        f"different: {d.transaction_id} {d.feature}: logged {d.logged!r}, recomputed {d.recomputed!r}" for d in report.examples
    ]
    return "\n".join(lines)


class LiveMetrics(ParityMetrics):
    def __init__(self) -> None:
        super().__init__()
        for name in FEATURE_NAMES:
            # Shown as 0 before its first, so that this is seen as an increase.
            self.different.labels(name)

    def note(self, report: Report) -> None:
        self.compared.inc(report.compared)
        self.missing.inc(report.missing_rows * len(report.equal))
        self.stale.inc(report.stale_rows)
        for name, n in report.different.items():
            self.different.labels(name).inc(n)
        self.checked.set_to_current_time()


def live(settings: Settings, sample: int, every_s: int) -> int:
    """Check a new sample of receipts every `every_s` seconds until SIGTERM. Exit status 1 when the port can't be used, else 0."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    metrics, stop = LiveMetrics(), threading.Event()
    try:
        server, _ = start_http_server(settings.parity_port, settings.host, metrics.registry)
    except OSError as exc:
        print(f"fraudgate parity: port {settings.parity_port} can't be used: {exc}; choose FRAUDGATE_PARITY_PORT", file=sys.stderr)
        return 1

    def end(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    seed = 0
    while True:
        try:
            report = check_parity(settings, sample=sample, seed=seed)
        except NoReceiptsError as exc:
            log.info("%s", exc)
        else:
            metrics.note(report)
            if report.different_values:
                log.error("%d of %d values differ: %s", report.different_values, report.compared, report.examples[:3])
        seed += 1
        if stop.wait(every_s):
            break
    server.shutdown()
    return 0
