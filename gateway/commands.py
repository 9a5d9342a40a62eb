"""`fraudgate serve` and `fraudgate score`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

import msgspec
import uvicorn

from gateway.app import DRAIN_S, Gateway
from gateway.contracts.decision import Answer
from gateway.contracts.settings import load_settings
from gateway.errors import PolicyRefusedError, Problem
from gateway.http import SCORE_PATH

SCORE_TIMEOUT_S = 10.0
LISTEN_BACKLOG = 2048
KEEP_ALIVE_S = 75


def serve(argv: Sequence[str]) -> int:
    """Run the gateway until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="fraudgate serve", description="Run the gateway: POST /score and the transactions topic.")
    parser.add_argument("--no-kafka", action="store_true", help="leave the transactions topic alone; HTTP only")
    args = parser.parse_args(argv)
    settings = load_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # aiokafka tells each retry of a connection; the doors say once that Kafka is down.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        gateway = Gateway(settings, kafka=not args.no_kafka)
    except PolicyRefusedError as exc:
        print(f"fraudgate serve: the policy can't be used: {exc}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        gateway,
        host=settings.host,
        port=settings.gateway_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        backlog=LISTEN_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(DRAIN_S),
    )
    # uvicorn raises the signal again once it has shut down: it has been heeded by then.
    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, lambda *_: None)
    server = uvicorn.Server(config)
    server.run()
    return gateway.exit_status if server.started else 1


def score(argv: Sequence[str]) -> int:
    """Send one transaction to the running gateway and print its decision. Exit status 1 when it is refused."""
    parser = argparse.ArgumentParser(prog="fraudgate score", description="Score one transaction, given as JSON.")
    parser.add_argument("transaction", help="the transaction as a JSON object; - reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print the answer as it came")
    args = parser.parse_args(argv)
    settings = load_settings()
    body = sys.stdin.buffer.read() if args.transaction == "-" else args.transaction.encode()
    # The URL is our own setting, hence http.
    request = urllib.request.Request(settings.gateway + SCORE_PATH, body, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=SCORE_TIMEOUT_S) as reply:  # noqa: S310
            answer = reply.read()
    except urllib.error.HTTPError as exc:
        with exc:
            _print_problem(exc.code, exc.read(), as_json=args.json)
        return 1
    except OSError as exc:
        reason = getattr(exc, "reason", exc)
        print(
            f"fraudgate score: no gateway answers at {settings.gateway} ({reason}); start one with: fraudgate serve",
            file=sys.stderr,
        )
        return 1
    print(answer.decode() if args.json else _readable(msgspec.json.decode(answer, type=Answer)))
    return 0


def _readable(a: Answer) -> str:
    probability = "unknown" if a.probability is None else f"{a.probability:.6f}"
    model = "none" if a.model is None else f"{a.model.name} {a.model.version} ({a.model.route})"
    lines = [
        f"{a.decision.value.upper()}  {a.transaction_id}",
        f"  risk score   {a.risk_score} of 1000, probability {probability}",
        f"  model        {model}",
    ]
    lines += [f"  reason       {r.code}: {r.text}" for r in a.reasons]
    if a.rule_hits:
        lines.append(f"  rules        {', '.join(a.rule_hits)}")
    if a.degraded:
        lines.append(f"  degraded     {', '.join(a.degraded)}")
    lines.append(f"  latency      {a.latency_ms:.1f} ms")
    return "\n".join(lines)


def _print_problem(status: int, body: bytes, *, as_json: bool) -> None:
    if as_json:
        print(body.decode(errors="replace"))
        return
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:
        print(f"fraudgate score: the gateway answered with status {status}", file=sys.stderr)
        return
    where = "" if problem.field is None else f" (field {problem.field})"
    print(f"fraudgate score: refused: {problem.reason}{where}: {problem.detail}", file=sys.stderr)
