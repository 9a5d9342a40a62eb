"""`fraudgate soak`: a constant load for minutes, a fault every two of them, and the proof of what was promised meanwhile.

Starts a stack of its own in a directory of its own (Kafka, Redis, schema registry, a gateway with two workers, the Spark streams), so
that a run can be had again from its seed; stops and removes all of it, also on Ctrl-C. docs/soak.md says what counts as good and what is
checked. Takes the minutes, the warm-up and about five minutes more; 8 KB of disk a payment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from deploy.bench.jobs import BenchError
from deploy.soak.plan import EVERY_S, KINDS, Plan, PlanError, make_plan
from deploy.soak.report import as_json, table
from deploy.soak.run import Outcome, Soak
from deploy.soak.stage import SoakError, say
from deploy.soak.timeline import draw
from deploy.soak.topics import TopicError
from deploy.stack import StackError

REPORT = Path("build/soak.json")
PICTURES = (".png", ".svg")


def soak(argv: list[str]) -> int:
    """Exit status 1 when a promise was not kept, or the soak could not be run to its end."""
    parser = argparse.ArgumentParser(
        prog="fraudgate soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, metavar="N", help="how long, the warm-up aside")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="of the payments, and of which faults come when")
    parser.add_argument("--rate", type=float, default=2000, metavar="N", help="payments a second (default %(default)s)")
    parser.add_argument("--warm-up", type=float, default=60, metavar="S", help="seconds that don't count (default %(default)s)")
    parser.add_argument("--every", type=float, default=EVERY_S, metavar="S", help="seconds for a fault (default %(default)s)")
    parser.add_argument(
        "--hold", type=float, metavar="S", help="how long each fault is held that has an end (default: by its kind)"
    )
    parser.add_argument(
        "--faults", default="", metavar="NAMES", help=f"these in this order, again and again, instead of drawn: {', '.join(KINDS)}"
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help="where to run (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="leave that directory with all data")
    parser.add_argument("--report", type=Path, default=REPORT, metavar="FILE", help="default %(default)s, with pictures beside it")
    parser.add_argument("--list", action="store_true", help="show which faults would come when, and end")
    options = parser.parse_args(argv)
    names = [name for name in options.faults.split(",") if name]
    try:
        plan = make_plan(options.minutes, options.seed, options.rate, options.warm_up, names, options.every, options.hold)
    except PlanError as exc:
        parser.error(str(exc))
    for fault in plan.faults:
        say(f"{fault.at_s:6.0f} s    {fault.kind.name}: {fault.kind.what}")
    if options.list:
        return 0
    signal.signal(signal.SIGTERM, interrupted)
    if options.home is not None:
        options.home.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="fraudgate-soak-", dir=options.home))
    try:
        outcome = run(plan, home)
    except (SoakError, StackError, BenchError, TopicError) as exc:
        print(f"fraudgate soak: {exc}", file=sys.stderr)
        return 1
    finally:
        logs = options.report.with_name(f"{options.report.stem}-logs")
        shutil.rmtree(logs, ignore_errors=True)
        shutil.copytree(home / "logs", logs, dirs_exist_ok=True)
        if not options.keep:
            shutil.rmtree(home, ignore_errors=True)
    write(outcome, options.report)
    for complaint in outcome.complaints:
        print(f"fraudgate soak: {complaint}", file=sys.stderr)
    return 1 if outcome.complaints else 0


def interrupted(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends it as Ctrl-C does."""
    raise KeyboardInterrupt


def run(plan: Plan, home: Path) -> Outcome:
    (home / "logs").mkdir(parents=True)
    soaking = Soak(plan, home)
    try:
        return soaking.run()
    finally:
        soaking.close()


def write(outcome: Outcome, report: Path) -> None:
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(as_json(outcome), indent=1) + "\n")
    plan = outcome.plan
    title = f"{plan.rate_per_s:g} payments a second for {plan.measured_s / 60:g} min, seed {plan.seed}"
    title += f": {len(outcome.complaints)} complaints" if outcome.complaints else ": passed"
    pictures = [report.with_suffix(suffix) for suffix in PICTURES]
    draw(outcome.verdict, outcome.happened, outcome.firings, title, pictures)
    print(f"\n{table(outcome)}\n\n{report}, {', '.join(str(p) for p in pictures)}")
