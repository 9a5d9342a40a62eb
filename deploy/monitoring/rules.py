"""Writes rules.yml, what Prometheus evaluates, from the objectives and alerts: python -m deploy.monitoring.rules (make docs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deploy.monitoring.alerts import ALERTS, Alert
from deploy.monitoring.slo import LATE, RECORD, SLOS, WINDOWS
from gateway.contracts.metrics import FRESH_WITHIN_S

RULES_PATH = Path(__file__).resolve().parent / "rules.yml"
RUNBOOKS_PATH = Path(__file__).resolve().parent.parent.parent / "docs/runbooks"
# In the committed file: relative to the repository. Who installs it elsewhere renders it with the address of the pages there.
RUNBOOKS = "docs/runbooks"
HEADER = "# Generated (make docs) from deploy/monitoring/slo.py and alerts.py: recording rules and alerts for Prometheus.\n"


def recording_rules() -> list[dict[str, Any]]:
    """What alerts and dashboards ask for again and again."""
    late = [
        f'max by (query) (fraudgate_jobs_freshness_seconds{{query="{query}"}}) > bool {within_s:g}'
        for query, within_s in FRESH_WITHIN_S.items()
    ]
    found: list[dict[str, Any]] = [
        {"record": LATE, "expr": " or ".join(late)},
        {"record": "fraudgate:consumer_lag_records:sum", "expr": "sum(fraudgate_consumer_lag_records)"},
    ]
    for slo in SLOS:
        found += [{"record": f"{RECORD}_{w}", "expr": slo.bad.replace("$w", w), "labels": {"slo": slo.name}} for w in WINDOWS]
    return found


def alerting_rule(alert: Alert, runbooks: str) -> dict[str, Any]:
    labels = {"severity": alert.severity, "component": alert.component, **({"slo": alert.slo} if alert.slo else {})}
    annotations = {"summary": alert.summary, "runbook_url": f"{runbooks}/{alert.name}.md"}
    return {"alert": alert.name, "expr": alert.expr, "for": alert.after, "labels": labels, "annotations": annotations}


def rules(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The file's content. `runbooks` is where the links lead."""
    alerts = [alerting_rule(alert, runbooks) for alert in ALERTS]
    return {"groups": [{"name": "fraudgate-slo", "rules": recording_rules()}, {"name": "fraudgate-alerts", "rules": alerts}]}


def text(runbooks: str = RUNBOOKS) -> str:
    """`rules` as YAML."""
    return HEADER + yaml.safe_dump(rules(runbooks), sort_keys=False, width=140)


if __name__ == "__main__":
    RULES_PATH.write_text(text())
    print(f"{RULES_PATH} written")
