"""`fraudgate jobs` and `fraudgate training-set`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from types import FrameType

from prometheus_client import start_http_server

from feature_jobs.metrics import Metrics
from feature_jobs.session import MissingJarError, build_session
from feature_jobs.silver import CheckpointLostError
from feature_jobs.supervisor import QUERIES, GaveUpError, Supervisor
from gateway.contracts.settings import load_settings


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
