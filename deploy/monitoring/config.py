"""The configuration of the local Prometheus and Alertmanager, as `fraudgate up --all` writes it at each start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deploy.monitoring.rules import RUNBOOKS_PATH
from deploy.monitoring.slo import PAGE, TICKET
from gateway.contracts.settings import Settings

NOBODY = "nobody"
# While the first is told, the second says nothing new: (name of the cause, components or names that follow from it).
INHIBITED: tuple[tuple[str, str], ...] = (
    ("GatewayDown", 'component=~"decisions|kafka|redis|models|policy"'),
    ("GatewayDown", 'alertname="TrafficGone"'),
    ("RedisNotReady", 'alertname=~"DecisionsDegraded|RedisSlow|FeaturesStale"'),
    ("JobsDown", 'alertname=~"Stream.*|Freshness.*|JobsLagGrows|FeaturesStale"'),
    ("KafkaDoorOut", 'alertname=~"KafkaLagGrows|KafkaStandsStill"'),
    ("DecisionsBurnFast", 'alertname=~"DecisionsBurnSlow|Latency.*"'),
    ("LatencyBurnFast", 'alertname="LatencyBurnSlow"'),
    ("FreshnessBurnFast", 'alertname="FreshnessBurnSlow"'),
)


def runbooks_of(settings: Settings) -> str:
    return settings.runbooks_url.rstrip("/") or RUNBOOKS_PATH.as_uri()


def prometheus_yml(settings: Settings, rules_path: Path) -> str:
    """Scrapes the gateway, the feature jobs and the case service of these settings, and tells Alertmanager."""
    # Of the two places that fraudgate deploy swaps one is mostly empty, and nobody is told: GatewayDown adds them up.
    gateways = [settings.gateway_port, settings.gateway_green_port]
    ports = {"gateway": gateways, "jobs": [settings.jobs_port], "cases": [settings.cases_port]}
    jobs: list[dict[str, Any]] = [
        {"job_name": name, "static_configs": [{"targets": [f"{settings.host}:{port}" for port in of]}]}
        for name, of in ports.items()
    ]
    # It runs only while somebody checks: nobody is told when it doesn't.
    jobs.append({"job_name": "parity", "static_configs": [{"targets": [f"{settings.host}:{settings.parity_port}"]}]})
    scheme, _, address = settings.alertmanager.partition("://")
    host, _, path = address.partition("/")
    manager: dict[str, Any] = {"scheme": scheme, "static_configs": [{"targets": [host]}]}
    if path:
        manager["path_prefix"] = f"/{path}"
    scrape = f"{settings.prometheus_scrape_ms}ms"
    return yaml.safe_dump(
        {
            "global": {
                "scrape_interval": scrape,
                "scrape_timeout": scrape,
                "evaluation_interval": f"{settings.prometheus_evaluate_ms}ms",
            },
            "rule_files": [str(rules_path)],
            "alerting": {"alertmanagers": [manager]},
            "scrape_configs": jobs,
        },
        sort_keys=False,
    )


def alertmanager_yml(settings: Settings) -> str:
    """Pages and tickets go to a webhook each, one message an alert; what follows from another is left out."""
    wait = f"{settings.alert_group_wait_ms}ms"
    receivers: list[dict[str, Any]] = [{"name": NOBODY}]
    routes = []
    for severity, url in ((PAGE, settings.alert_page_url), (TICKET, settings.alert_ticket_url)):
        if url:
            webhook: dict[str, Any] = {"url": url, "send_resolved": True}
            if settings.alert_token_path:
                # The file and not the token: it stands in no configuration, and may change without a restart.
                credentials = str(Path(settings.alert_token_path).expanduser().absolute())
                webhook["http_config"] = {"authorization": {"type": "Bearer", "credentials_file": credentials}}
            receivers.append({"name": severity, "webhook_configs": [webhook]})
        routes.append({"receiver": severity if url else NOBODY, "matchers": [f'severity="{severity}"']})
    return yaml.safe_dump(
        {
            "route": {
                "receiver": NOBODY,
                "group_by": ["alertname"],
                "group_wait": wait,
                "group_interval": wait,
                "repeat_interval": f"{settings.alert_repeat_m}m",
                "routes": routes,
            },
            "inhibit_rules": [
                {"source_matchers": [f'alertname="{cause}"'], "target_matchers": [follows]} for cause, follows in INHIBITED
            ],
            "receivers": receivers,
        },
        sort_keys=False,
        width=140,
    )
