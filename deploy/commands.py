"""The subcommands that start, stop and look at the local stack, and those that join several packages."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys

from deploy.stack import ServiceStatus, Stack, StackError
from gateway.contracts.settings import load_settings


def up(argv: list[str]) -> int:
    """`fraudgate up`."""
    parser = argparse.ArgumentParser(
        prog="fraudgate up", description="Start what isn't running, and wait until all of it is ready."
    )
    parser.add_argument(
        "--all", action="store_true", help="also start the feature jobs, the gateway, the case service, Prometheus and Alertmanager"
    )
    parser.add_argument("service", nargs="*", help="start these alone; nothing is created, and what they need must run")
    parser.add_argument(
        "--proxy", action="store_true", help="also start the local proxy that fraudgate deploy swaps gateways behind"
    )
    arguments = parser.parse_args(argv)
    try:
        stack = Stack(load_settings(), _say)
        if arguments.service:
            stack.start(arguments.service)
        else:
            stack.up(everything=arguments.all)
        if arguments.proxy:
            stack.start(["proxy"])
    except StackError as exc:
        return _fail("up", exc)
    return 0


def down(argv: list[str]) -> int:
    """`fraudgate down`."""
    parser = argparse.ArgumentParser(
        prog="fraudgate down", description="Stop everything that up started, or the services that are named."
    )
    parser.add_argument("service", nargs="*", help="stop these alone")
    names = parser.parse_args(argv).service
    settings = load_settings()
    try:
        stopped = Stack(settings, _say).stop(names or None)
    except StackError as exc:
        return _fail("down", exc)
    if not names:
        _say("everything is stopped" if stopped else f"nothing of {settings.home_path} is running")
    elif not stopped:
        _say(f"{' and '.join(names)}: not running")
    return 0


def restart(argv: list[str]) -> int:
    """`fraudgate restart SERVICE`."""
    parser = argparse.ArgumentParser(prog="fraudgate restart", description="Stop one service and start it again.")
    parser.add_argument(
        "service", help="kafka, redis, registry, mlflow, jobs, gateway, gateway-green, proxy, cases, prometheus or alertmanager"
    )
    arguments = parser.parse_args(argv)
    try:
        Stack(load_settings(), _say).restart(arguments.service)
    except StackError as exc:
        return _fail("restart", exc)
    return 0


def status(argv: list[str]) -> int:
    """`fraudgate status`: exit status 1 when something that was started is not well, or nothing runs at all."""
    parser = argparse.ArgumentParser(prog="fraudgate status", description="What runs, on which port, and whether it is well.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    entries = Stack(load_settings()).status()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
    else:
        print(status_table(entries))
    running = any(entry.state == "running" for entry in entries)
    return 0 if running and all(entry.well for entry in entries) else 1


def status_table(entries: list[ServiceStatus]) -> str:
    rows = [("service", "state", "pid", "port", "health", "memory", "uptime")]
    for e in entries:
        runs = e.state == "running"
        memory, uptime = (f"{e.memory_mb:.0f} MiB", _duration(e.uptime_s)) if runs else ("-", "-")
        rows.append((e.name, e.state, str(e.pid or "-"), str(e.port), e.health, memory, uptime))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} m" if hours else f"{m} m {s:02} s" if m else f"{s} s"


def _say(line: str) -> None:
    # A reader that went away (fraudgate down | head) must not leave the work half done.
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _fail(command: str, exc: StackError) -> int:
    print(f"fraudgate {command}: {exc}", file=sys.stderr)
    return 1
