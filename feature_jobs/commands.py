"""`fraudgate jobs`, `fraudgate rebuild`, `fraudgate backfill` and `fraudgate training-set`."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from types import FrameType

from prometheus_client import start_http_server
from pyspark.errors import PySparkException

from feature_jobs import labels, lake, silver
from feature_jobs.backfill import OtherFeaturesError
from feature_jobs.backfill import backfill as backfill_features
from feature_jobs.metrics import Metrics
from feature_jobs.rebuild import NothingToRebuildError, RedisInUseError, by_hand
from feature_jobs.session import MissingJarError, build_session
from feature_jobs.silver import CheckpointLostError
from feature_jobs.supervisor import QUERIES, GaveUpError, Supervisor
from feature_jobs.tiles import RedisUnavailableError
from feature_jobs.training_set import LABEL_DELAY_DAYS, NoHistoryError, write_training_set
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import load_settings

PROBE_S = 1.0


def jobs(argv: list[str]) -> int:
    """Run the streams until SIGTERM. Exit status 1 when they can't run, else 0."""
    parser = argparse.ArgumentParser("fraudgate jobs", description="Run the Spark streams: bronze, silver and Redis, gold.")
    parser.add_argument("--once", action="store_true", help="process what is there now, then exit")
    parser.add_argument("--queries", default=",".join(QUERIES), help=f"which, separated by commas (default: {','.join(QUERIES)})")
    options = parser.parse_args(argv)
    queries = tuple(options.queries.split(","))
    unknown = set(queries) - set(QUERIES)
    if unknown:
        parser.error(f"there is no query {sorted(unknown)[0]!r}; there are {', '.join(QUERIES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("py4j").setLevel(logging.WARNING)
    settings = load_settings()
    metrics = Metrics()
    try:
        server, _ = start_http_server(settings.jobs_port, settings.host, metrics.registry)
    except OSError as exc:
        print(f"fraudgate jobs: port {settings.jobs_port} can't be used: {exc}; choose FRAUDGATE_JOBS_PORT", file=sys.stderr)
        return 1
    try:
        spark = build_session(settings)
    except MissingJarError as exc:
        print(f"fraudgate jobs: {exc}", file=sys.stderr)
        return 1
    try:
        supervisor = Supervisor(spark, settings, metrics, queries)

        def stop(_signal: int, _frame: FrameType | None) -> None:
            supervisor.stop.set()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print("fraudgate jobs: streams are starting", file=sys.stderr)
        if options.once:
            supervisor.run_once()
        else:
            supervisor.run()
    except (CheckpointLostError, GaveUpError) as exc:
        print(f"fraudgate jobs: {exc}", file=sys.stderr)
        return 1
    finally:
        spark.stop()
        server.shutdown()
    return 0


def rebuild(argv: list[str]) -> int:
    """Restore Redis from Delta. Exit status 1 when that can't be done now."""
    parser = argparse.ArgumentParser("fraudgate rebuild", description="Restore the tiles and heads in Redis from the Delta tables.")
    parser.add_argument(
        "--as-of",
        dest="as_of_ms",
        type=instant_ms,
        metavar="MS|DATE",
        help="what silver had written by then, into an empty Redis (default: now, whatever Redis holds)",
    )
    options = parser.parse_args(argv)
    settings = load_settings()
    # Two writers would only fence each other off: the streams rebuild by themselves what they miss.
    with socket.socket() as probe:
        probe.settimeout(PROBE_S)
        if probe.connect_ex((settings.host, settings.jobs_port)) == 0:
            where = f"{settings.host}:{settings.jobs_port}"
            print(f"fraudgate rebuild: the feature jobs run ({where} answers); stop them first", file=sys.stderr)
            return 1
    try:
        spark = build_session(settings)
    except MissingJarError as exc:
        print(f"fraudgate rebuild: {exc}", file=sys.stderr)
        return 1
    started = time.monotonic()
    try:
        held = lake.load_epoch(spark, settings, silver.TILES) or lake.load_epoch(spark, settings, silver.QUERY) or 0
        done, batch_id = by_hand(spark, settings, silver.TILES, held, options.as_of_ms)
        labels.rebuild_by_hand(spark, settings, options.as_of_ms)
    except (NothingToRebuildError, RedisInUseError, RedisUnavailableError, PySparkException) as exc:
        print(f"fraudgate rebuild: {exc}", file=sys.stderr)
        return 1
    finally:
        spark.stop()
    print(
        f"Redis holds {done.entities} entities of {done.transactions} transactions, as of batch {batch_id} of silver, "
        f"after {time.monotonic() - started:.1f} s"
    )
    return 0


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
