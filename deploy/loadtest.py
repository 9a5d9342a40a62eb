"""`fraudgate loadtest`: Locust drives the SLA scenario (loadtest/locustfile.py), and the exit status says whether it was kept.

Uses the gateway that runs under the settings in force; where none answers it starts a stack and a model of its own in a temporary
directory and stops them at the end.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.bench.jobs import BenchError
from deploy.bench.stage import Stage, remove, say
from deploy.services import http_ok
from deploy.stack import StackError
from gateway.contracts.settings import load_settings

LOCUSTFILE = Path(__file__).resolve().parent.parent / "loadtest/locustfile.py"
REPORT_FILE = Path("build/loadtest.html")
# Beyond the scenario's own time: Locust's start, the last answers and the report.
SPARE_S = 60.0


def loadtest(argv: list[str]) -> int:
    """Exit status 1 when p99 or the error budget is broken, or it can't be measured."""
    parser = argparse.ArgumentParser(
        "fraudgate loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--users", type=int, default=40, metavar="N", help="callers, each 10 requests a second (default %(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=60, metavar="S", help="of the scenario (default %(default)s)")
    parser.add_argument("--p99-ms", type=float, default=100.0, metavar="MS", help="longest p99 (default %(default)s)")
    parser.add_argument("--error-budget", type=float, default=0.001, metavar="X", help="share that may fail (default %(default)s)")
    parser.add_argument("--html", type=Path, default=REPORT_FILE, metavar="FILE", help="Locust's report (default %(default)s)")
    options = parser.parse_args(argv)
    if not (1 <= options.users <= 1000 and 1 <= options.seconds <= 3600 and 0 <= options.error_budget < 1 and options.p99_ms > 0):
        parser.error("1 to 1,000 users, 1 to 3,600 seconds, a p99 above 0 and a budget from 0 to under 1 are needed")
    url = load_settings().gateway
    if http_ok(f"{url}/readyz"):
        say(f"loadtest    the gateway at {url}")
        return drive(url, options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = Path(tempfile.mkdtemp(prefix="fraudgate-loadtest-"))
    try:
        stage = Stage(home)
        try:
            stage.start()
            stage.share()
            return drive(stage.settings.gateway, options)
        finally:
            stage.close()
    except (BenchError, StackError) as exc:
        print(f"fraudgate loadtest: {exc}", file=sys.stderr)
        return 1
    finally:
        remove(home)


def drive(url: str, options: argparse.Namespace) -> int:
    options.html.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    argv += ["--users", str(options.users), "--spawn-rate", str(options.users), "--run-time", f"{options.seconds}s"]
    argv += ["--html", str(options.html), "--p99-ms", str(options.p99_ms), "--error-budget", str(options.error_budget)]
    try:
        status = subprocess.run(argv, check=False, timeout=options.seconds + SPARE_S).returncode
    except subprocess.TimeoutExpired:
        print("fraudgate loadtest: Locust did not come to its end", file=sys.stderr)
        return 1
    say(f"the report: {options.html}")
    return 1 if status else 0
