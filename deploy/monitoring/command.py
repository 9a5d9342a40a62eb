"""`fraudgate alerts`: every alert with what Prometheus says of it now, and where its runbook is."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from deploy.monitoring.alerts import ALERTS
from deploy.monitoring.config import runbooks_of
from deploy.monitoring.slo import PAGE
from gateway.contracts.settings import Settings, load_settings

ASK_TIMEOUT_S = 5.0
FIRING, PENDING, QUIET, UNKNOWN = "firing", "pending", "quiet", "unknown"
ORDER = (FIRING, PENDING, UNKNOWN, QUIET)


class PrometheusUnavailableError(RuntimeError):
    """Prometheus can't be asked. The message says where it was looked for."""


@dataclass(frozen=True)
class Told:
    """One alert. `since_s` is seconds since the first of `about` (what Prometheus says of each case) began; None while it is quiet."""

    name: str
    severity: str
    component: str
    state: str
    since_s: float | None
    about: list[str]
    runbook: str


def ask(settings: Settings, now_s: float) -> list[Told]:
    """All alerts, the worst first. Raises `PrometheusUnavailableError`."""
    url = f"{settings.prometheus}/api/v1/rules?type=alert"
    try:
        with urllib.request.urlopen(url, timeout=ASK_TIMEOUT_S) as reply:  # noqa: S310
            groups = json.load(reply)["data"]["groups"]
    except (OSError, ValueError, KeyError) as exc:
        raise PrometheusUnavailableError(f"Prometheus doesn't answer at {settings.prometheus} ({exc})") from exc
    found = {rule["name"]: rule for group in groups for rule in group["rules"]}
    told = [
        _told(found.get(alert.name), alert.name, alert.severity, alert.component, runbooks_of(settings), now_s) for alert in ALERTS
    ]
    return sorted(told, key=lambda t: (ORDER.index(t.state), t.severity != PAGE))


def _told(rule: dict[str, Any] | None, name: str, severity: str, component: str, runbooks: str, now_s: float) -> Told:
    runbook = f"{runbooks}/{name}.md"
    if rule is None:
        # A Prometheus with other rules than these.
        return Told(name, severity, component, UNKNOWN, None, [], runbook)
    cases = rule.get("alerts", [])
    state = {"firing": FIRING, "pending": PENDING}.get(rule["state"], QUIET)
    began = [datetime.fromisoformat(_to_microseconds(case["activeAt"])).timestamp() for case in cases]
    about = sorted({case["annotations"].get("summary", "") for case in cases})
    return Told(name, severity, component, state, now_s - min(began) if began else None, about, runbook)


def _to_microseconds(text: str) -> str:
    """Prometheus tells nanoseconds, without the zeros at their end; Python 3.11 reads six digits at most."""
    head, dot, rest = text.rstrip("Z").partition(".")
    return f"{head}.{rest[:6].ljust(6, '0')}+00:00" if dot else f"{head}+00:00"


def table(told: list[Told]) -> str:
    """What a person reads: a line an alert, what it is about below those that aren't quiet."""
    lines = [f"{'alert':<26}{'severity':<10}{'component':<11}{'state':<9}since"]
    for t in told:
        since = "-" if t.since_s is None else f"{t.since_s:.0f} s"
        lines.append(f"{t.name:<26}{t.severity:<10}{t.component:<11}{t.state:<9}{since}")
        if t.state in (FIRING, PENDING):
            lines += [f"    {text}" for text in t.about]
            lines.append(f"    {t.runbook}")
    return "\n".join(lines)


def alerts(argv: list[str]) -> int:
    """`fraudgate alerts`: exit status 0 when nothing pages, 2 when something does, 1 when Prometheus can't be asked."""
    parser = argparse.ArgumentParser(prog="fraudgate alerts", description="Every alert, its state now, and its runbook.")
    parser.add_argument("--firing", action="store_true", help="only those that aren't quiet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    settings = load_settings()
    try:
        told = ask(settings, time.time())
    except PrometheusUnavailableError as exc:
        print(f"fraudgate alerts: {exc}; fraudgate up --all starts one", file=sys.stderr)
        return 1
    if arguments.firing:
        told = [t for t in told if t.state != QUIET]
    if arguments.json:
        print(json.dumps([asdict(t) for t in told], indent=2))
    else:
        print(table(told) if told else "nothing is wrong")
    return 2 if any(t.state == FIRING and t.severity == PAGE for t in told) else 0
