"""`fraudgate serve`, `fraudgate reload` and `fraudgate score`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

import msgspec

from gateway.api_keys import KeyFileError
from gateway.contracts.decision import Answer
from gateway.contracts.settings import client_headers, load_settings
from gateway.errors import PolicyRefusedError, Problem
from gateway.http.door import SCORE_PATH
from gateway.supervisor import PID_FILE, POLICY_STATUS, Supervisor
from gateway.worker import log_to_stderr, run

SCORE_TIMEOUT_S = 10.0
WORKERS_MAX = 256


def serve(argv: Sequence[str]) -> int:
    """Run the gateway until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="fraudgate serve", description="Run the gateway: POST /score and the transactions topic.")
    parser.add_argument("--no-kafka", action="store_true", help="leave the transactions topic alone; HTTP only")
    parser.add_argument(
        "--standby",
        action="store_true",
        help="serve HTTP, and leave the transactions topic to another gateway of this instance until SIGUSR1 says so",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="run N processes behind one socket, one a core; SIGHUP or fraudgate reload replaces them one by one",
    )
    args = parser.parse_args(argv)
    if args.workers is not None and not 1 <= args.workers <= WORKERS_MAX:
        parser.error(f"--workers must be in 1..{WORKERS_MAX}")
    if args.workers is not None and args.standby:
        parser.error("--standby is for one process, not for --workers")
    settings = load_settings()
    log_to_stderr()
    if args.workers is not None:
        return asyncio.run(Supervisor(settings, args.workers, kafka=not args.no_kafka).run())
    try:
        return run(settings, kafka=not args.no_kafka, consume=not args.standby)
    except KeyFileError as exc:
        print(f"fraudgate serve: the API keys can't be used: {exc}", file=sys.stderr)
        return POLICY_STATUS
    except PolicyRefusedError as exc:
        print(f"fraudgate serve: the policy can't be used: {exc}", file=sys.stderr)
        return POLICY_STATUS


def reload(argv: Sequence[str]) -> int:
    """Have the workers of the gateway that runs here replaced by new ones, one by one."""
    argparse.ArgumentParser(
        prog="fraudgate reload",
        description="Replace the workers of fraudgate serve --workers one by one, without losing a request.",
    ).parse_args(argv)
    path = load_settings().home_path / PID_FILE
    try:
        os.kill(int(path.read_text()), signal.SIGHUP)
    except (OSError, ValueError):
        print(f"fraudgate reload: no gateway with workers runs here ({path})", file=sys.stderr)
        return 1
    return 0


def score(argv: Sequence[str]) -> int:
    """Send one transaction to the running gateway and print its decision. Exit status 1 when it is refused."""
    parser = argparse.ArgumentParser(prog="fraudgate score", description="Score one transaction, given as JSON.")
    parser.add_argument("transaction", help="the transaction as a JSON object; - reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print the answer as it came")
    args = parser.parse_args(argv)
    settings = load_settings()
    body = sys.stdin.buffer.read() if args.transaction == "-" else args.transaction.encode()
    headers = {"Content-Type": "application/json"} | client_headers(settings)
    # The URL is our own setting, hence http.
    request = urllib.request.Request(settings.gateway + SCORE_PATH, body, headers)  # noqa: S310
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
