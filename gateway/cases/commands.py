"""`fraudgate cases`: the case service."""

from __future__ import annotations

import argparse
import logging
import signal
import sqlite3
import sys
from collections.abc import Sequence

import uvicorn

from gateway.cases.app import make_app
from gateway.cases.service import CaseService
from gateway.contracts.settings import load_settings
from gateway.errors import GatewayError
from gateway.supervisor import POLICY_STATUS

# Of people and back offices. One connection more is answered 503.
CONNECTIONS_MAX = 256
GRACE_S = 5


def cases(argv: Sequence[str]) -> int:
    """Run the case service until SIGTERM or SIGINT."""
    argparse.ArgumentParser(
        prog="fraudgate cases",
        description="Run the case service: the review queue, labels, lists and webhooks, as an API on the setting cases_port.",
    ).parse_args(argv)
    settings = load_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        service = CaseService(settings)
    except (GatewayError, sqlite3.Error, OSError) as exc:
        print(f"fraudgate cases: {exc}", file=sys.stderr)
        return POLICY_STATUS
    config = uvicorn.Config(
        make_app(service),
        host=settings.host,
        port=settings.cases_port,
        # h11 bounds request lines and headers.
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=GRACE_S,
    )
    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, lambda *_: None)
    server = uvicorn.Server(config)
    server.run()
    return 0 if server.started else 1
