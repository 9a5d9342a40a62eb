"""`fraudgate deploy`: the next version of the gateway takes over without a lost request, or the old one goes on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from deploy.locked import locked
from deploy.rollout import watch
from deploy.rollout.proxy import Proxy, socket_path
from deploy.rollout.state import (
    FIXED_SETTINGS,
    ROOT,
    SERVICE_OF,
    SLOTS,
    RolloutError,
    State,
    Version,
    changed_settings,
    commit_of,
    port_of,
    read_state,
)
from deploy.rollout.swap import Plan, Swap
from deploy.stack import Stack, StackError
from gateway.contracts.settings import ENV_PREFIX, SettingError, Settings, load_settings

LOCK_FILE = "rollout/lock"
PERCENT_MAX = 100
# A deploy that takes longer watches nothing any more that a person wouldn't.
SECONDS_MAX = 3600.0


def deploy(argv: Sequence[str]) -> int:
    """`fraudgate deploy`. Exit status 1 when the old version goes on, or nothing could be begun."""
    parser = _parser()
    args = parser.parse_args(argv)
    settings = load_settings()
    if args.status:
        return _status(settings, as_json=args.json)
    try:
        plan, version = _plan(parser, args), None
        if not args.rollback and not args.settle:
            version = _version(settings, args)
        with locked(settings.home_path / LOCK_FILE, RolloutError("another fraudgate deploy is at work")), _terminated_politely():
            return _run(settings, plan, version, settle=args.settle)
    except (RolloutError, StackError) as exc:
        print(f"fraudgate deploy: {exc}", file=sys.stderr)
        return 1


def _run(settings: Settings, plan: Plan, version: Version | None, *, settle: bool) -> int:
    state = read_state(settings.home_path)
    swap = Swap(settings, Stack(settings), plan, _say)
    if settle:
        if state is None:
            raise RolloutError("nothing was deployed here yet")
        swap.settle(state)
        return 0
    if version is None:
        version = _former(state)
    swap.run(version)
    return 0


def _former(state: State | None) -> Version:
    """What ran before the last deploy."""
    version = None if state is None else state.versions.get(state.other)
    if version is None:
        raise RolloutError("there is no former version to go back to")
    now = commit_of(Path(version.directory))
    if now != version.commit:
        _say(
            f"warning: {version.directory} is at {now or 'no known commit'} now, and was at {version.commit or 'none'} when it ran"
        )
    return version


def _version(settings: Settings, args: argparse.Namespace) -> Version:
    """Raises `SettingError`, `RolloutError`."""
    directory = ROOT if args.version_dir is None else Path(args.version_dir).absolute()
    if not (directory / "deploy/cli.py").is_file():
        raise RolloutError(f"{directory} is no checkout of Fraudgate: it has no deploy/cli.py")
    python = args.python
    if python is None:
        own = directory / ".venv/bin/python"
        python = str(own) if own.exists() else sys.executable
    values, given = changed_settings(settings), []
    wanted = list(args.settings)
    if args.policy is not None:
        wanted.append(f"{ENV_PREFIX}POLICY_PATH={Path(args.policy).absolute()}")
    for pair in wanted:
        name, equals, value = pair.partition("=")
        name = name if name.startswith(ENV_PREFIX) else ENV_PREFIX + name
        if not equals:
            raise SettingError(f"--settings wants NAME=VALUE, not {pair!r}")
        if name in FIXED_SETTINGS:
            raise SettingError(f"{name} belongs to the machine, and a version can't have another")
        values[name] = value
        given.append(name)
    if directory == ROOT:
        # Another checkout may know other settings, and refuses what it doesn't know by itself.
        load_settings(values)
    return Version(directory=str(directory), python=python, settings=values, given=tuple(given), commit=commit_of(directory))


def _plan(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Plan:
    if not 1 <= args.canary_percent <= PERCENT_MAX:
        parser.error("--canary-percent must be in 1..100")
    if not 0 <= args.errors_percent <= PERCENT_MAX:
        parser.error("--errors-percent must be in 0..100")
    for name in ("ready_s", "canary_s", "bake_s"):
        if not 0 <= getattr(args, name) <= SECONDS_MAX:
            parser.error(f"--{name.replace('_', '-')} must be in 0..{SECONDS_MAX:.0f}")
    if args.p99_ms is not None and args.p99_ms <= 0:
        parser.error("--p99-ms must be above 0")
    return Plan(
        ready_s=args.ready_s,
        canary_percent=args.canary_percent,
        canary_s=args.canary_s,
        bake_s=args.bake_s,
        failed_share_max=args.errors_percent / 100,
        p99_s_max=None if args.p99_ms is None else args.p99_ms / 1000,
        reason=args.reason,
        action="deploy_rollback" if args.rollback else "deploy",
    )


def _parser() -> argparse.ArgumentParser:
    usual = Plan()
    parser = argparse.ArgumentParser(
        prog="fraudgate deploy",
        description="Start the next version of the gateway beside the one that runs, move the traffic over behind the local proxy,"
        " watch it, and end the old one; or go back to it, with exit status 1, when the new one doesn't come up or does worse.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="show which version runs where, and what the proxy sees")
    what.add_argument("--rollback", action="store_true", help="go back to the version before, the same way")
    what.add_argument(
        "--settle", action="store_true", help="after a deploy that broke off: the active version gets everything back"
    )
    parser.add_argument("--version-dir", metavar="DIR", help="checkout of the new version (default: this one)")
    parser.add_argument("--python", metavar="FILE", help="what runs it (default: its .venv/bin/python, else this Python)")
    parser.add_argument(
        "--settings", metavar="NAME=VALUE", action="append", default=[], help="a setting of the new version; may be given again"
    )
    parser.add_argument("--policy", metavar="DIR", help="the new version's policy, as --settings POLICY_PATH=DIR")
    parser.add_argument("--ready-s", type=float, default=usual.ready_s, help="longest time to become ready (default %(default)s)")
    parser.add_argument(
        "--canary-percent", type=int, default=usual.canary_percent, help="share of the requests to begin with (default %(default)s)"
    )
    parser.add_argument("--canary-s", type=float, default=usual.canary_s, help="for how long; 0: not at all (default %(default)s)")
    parser.add_argument(
        "--bake-s", type=float, default=usual.bake_s, help="how long it is watched with all requests (default %(default)s)"
    )
    parser.add_argument(
        "--errors-percent",
        type=float,
        default=usual.failed_share_max * 100,
        help="most of the requests that may fail meanwhile (default %(default)s)",
    )
    parser.add_argument("--p99-ms", type=float, help="most its p99 may be (default: 100 ms, or twice the old version's)")
    parser.add_argument("--reason", default="", help="why, for the audit file")
    parser.add_argument("--json", action="store_true", help="print --status as JSON")
    return parser


def _status(settings: Settings, *, as_json: bool) -> int:
    """Exit status 1 when the active version doesn't have all traffic."""
    state = read_state(settings.home_path)
    if state is None:
        print("nothing was deployed here yet: the gateway that fraudgate up started is the only one")
        return 0
    told = _told(settings, state)
    active = told["slots"][state.active]
    well = active["pid"] is not None and str(active["proxy"]).startswith("UP") and state.trial is None
    if as_json:
        print(json.dumps(told, indent=2))
        return 0 if well else 1
    print(f"callers    {settings.proxy}/score")
    for slot, found in told["slots"].items():
        runs = "does not run" if found["pid"] is None else f"pid {found['pid']}, port {found['port']}"
        role = "active" if slot == state.active else "other"
        print(f"{slot:<10} {role:<7} {runs}; proxy: {found['proxy']}; consumes: {found['consuming']}; {found['version']}")
    if state.trial is not None:
        print(f"a deploy is under way or broke off; if none is: fraudgate deploy --settle gives {state.active} everything back")
    return 0 if well else 1


def _told(settings: Settings, state: State) -> dict[str, Any]:
    stack = Stack(settings)
    try:
        stats = {slot: dataclasses.asdict(stat) for slot, stat in Proxy(socket_path(settings)).stats().items()}
    except RolloutError:
        stats = {}
    slots = {}
    for slot in SLOTS:
        port = port_of(settings, slot)
        found = watch.readiness(f"http://{settings.host}:{port}")
        version = state.version_of(slot)
        slots[slot] = {
            "pid": stack.pid(SERVICE_OF[slot]),
            "port": port,
            "proxy": stats.get(slot, {}).get("status", "does not answer"),
            "sessions": stats.get(slot, {}).get("sessions"),
            "consuming": found is not None and bool(found.consuming),
            "version": None if version is None else version.told(),
        }
    return {
        "active": state.active,
        "under_way": None if state.trial is None else state.trial.told(),
        "callers": f"{settings.proxy}/score",
        "slots": slots,
    }


@contextlib.contextmanager
def _terminated_politely() -> Any:
    """SIGTERM and a closed terminal give the traffic back as Ctrl-C does."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)
