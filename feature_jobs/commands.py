"""`fraudgate jobs` and `fraudgate rebuild`: what starts Spark."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from types import FrameType

from pyspark.errors import PySparkException

from feature_jobs import labels, lake, silver
from feature_jobs.metrics import Metrics
from feature_jobs.probes import Health, serve
from feature_jobs.rebuild import NothingToRebuildError, RedisInUseError, by_hand
from feature_jobs.session import MissingJarError, build_session
from feature_jobs.silver import CheckpointLostError
from feature_jobs.supervisor import QUERIES, GaveUpError, Supervisor
from feature_jobs.tiles import RedisUnavailableError
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
    metrics, health = Metrics(), Health()
    try:
        server = serve(settings.host, settings.jobs_port, metrics.registry, health)
    except OSError as exc:
        print(f"fraudgate jobs: port {settings.jobs_port} can't be used: {exc}; choose FRAUDGATE_JOBS_PORT", file=sys.stderr)
        return 1
    try:
        spark = build_session(settings)
    except MissingJarError as exc:
        print(f"fraudgate jobs: {exc}", file=sys.stderr)
        return 1
    try:
        supervisor = Supervisor(spark, settings, metrics, queries, health)

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
        server.server_close()
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
