"""What must be true of the rendered chart and no API server looks at. Each rule is a function from manifests to complaints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from gateway.contracts.settings import ENV_PREFIX, SettingError, Settings, load_settings
from gateway.supervisor import LEAVE_TIMEOUT_S

Manifest = dict[str, Any]
WORKLOADS = frozenset({"CronJob", "Deployment", "Job", "StatefulSet"})
OUR_IMAGES = ("fraudgate-gateway", "fraudgate-jobs", "fraudgate-export")
# They write their configuration beside themselves.
WRITES_ITS_ROOT = frozenset({"kafka", "registry"})
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|_KEY$")
KNOWN = {ENV_PREFIX + f.name.upper() for f in fields(Settings)}


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def pod_of(manifest: Manifest) -> Manifest | None:
    """The pod template of a workload, None of anything else."""
    if manifest["kind"] not in WORKLOADS:
        return None
    spec = manifest["spec"]
    template: Manifest = spec["jobTemplate"]["spec"]["template"] if manifest["kind"] == "CronJob" else spec["template"]
    return template


def pods(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each workload with its pod template."""
    for manifest in manifests:
        template = pod_of(manifest)
        if template is not None:
            yield manifest, template


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def is_ours(container: Manifest) -> bool:
    return any(f"{image}:" in container["image"] or f"{image}@" in container["image"] for image in OUR_IMAGES)


def service_complaints(manifests: list[Manifest]) -> list[str]:
    """A Service that selects no pod, or whose port no container has: it is accepted, and answers nobody."""
    complaints = []
    for service in (m for m in manifests if m["kind"] == "Service"):
        wanted = service["spec"]["selector"].items()
        hit = [t for _, t in pods(manifests) if wanted <= t["metadata"]["labels"].items()]
        if not hit:
            complaints.append(f"{name_of(service)} selects no pod")
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            for template in hit:
                held = {
                    p.get("name") if isinstance(target, str) else p["containerPort"]
                    for c in containers(template)
                    for p in c.get("ports", [])
                }
                if target not in held:
                    complaints.append(f"{name_of(service)}: no container has the port {target}")
    return complaints


def probe_complaints(manifests: list[Manifest]) -> list[str]:
    """A probe of a port that its container doesn't have, and a long-running container of ours without probes."""
    complaints = []
    for workload, template in pods(manifests):
        serves = workload["kind"] in ("Deployment", "StatefulSet")
        for container in template["spec"]["containers"]:
            held = {p["name"] for p in container.get("ports", [])}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind)
                if probe is None and serves:
                    complaints.append(f"{name_of(workload)}: {container['name']} has no {kind}")
                asked = (probe or {}).get("httpGet") or (probe or {}).get("tcpSocket")
                if asked is not None and asked["port"] not in held:
                    complaints.append(f"{name_of(workload)}: {kind} asks the port {asked['port']}, which isn't there")
    return complaints


def environment(container: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """What a container's process finds; what comes from a Secret or from the pod is made up."""
    env: dict[str, str] = {}
    maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            env |= maps[source["configMapRef"]["name"]]
    for entry in container.get("env") or []:
        made_up = (
            "fraudgate-gateway-7d9c5b6f4-x2x9p" if "fieldRef" in entry.get("valueFrom", {}) else "redis://:secret@elsewhere:6379/0"
        )
        env[entry["name"]] = entry.get("value", made_up)
    return env


def setting_complaints(manifests: list[Manifest]) -> list[str]:
    """Variables with our prefix that name no setting, and settings that the process would refuse."""
    complaints = []
    for workload, template in pods(manifests):
        for container in filter(is_ours, containers(template)):
            where = f"{name_of(workload)}: {container['name']}"
            env = environment(container, manifests)
            complaints += [f"{where}: {name} is no setting" for name in env if name.startswith(ENV_PREFIX) and name not in KNOWN]
            names = [entry["name"] for entry in container.get("env") or []]
            complaints += [f"{where}: {name} twice" for name in sorted({n for n in names if names.count(n) > 1})]
            try:
                load_settings(env)
            except SettingError as exc:
                complaints.append(f"{where}: {exc}")
    return complaints


def security_complaints(manifests: list[Manifest]) -> list[str]:
    """Less than the restricted Pod Security Standard and a root that is read-only; secrets that stand in a manifest."""
    complaints = []
    complaints += [f"{name_of(m)}: a secret is made elsewhere and named here" for m in manifests if m["kind"] == "Secret"]
    for workload, template in pods(manifests):
        spec, where = template["spec"], name_of(workload)
        context = spec.get("securityContext", {})
        if (
            not context.get("runAsNonRoot")
            or not context.get("runAsUser")
            or context.get("seccompProfile", {}).get("type") != "RuntimeDefault"
        ):
            complaints.append(f"{where}: the pod may run as root, or without a seccomp profile")
        if spec.get("automountServiceAccountToken") is not False:
            complaints.append(f"{where}: the pod has a token of the API server")
        if spec.get("enableServiceLinks") is not False:
            complaints.append(f"{where}: service links set variables that are settings")
        for container in containers(template):
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
                complaints.append(f"{where}: {container['name']} may gain privileges")
            if own.get("readOnlyRootFilesystem") is not True and container["name"] not in WRITES_ITS_ROOT:
                complaints.append(f"{where}: {container['name']} may write its image")
            told = [e["name"] for e in container.get("env") or [] if "value" in e and SECRET_NAME.search(e["name"])]
            complaints += [f"{where}: {container['name']} has the value of {name}" for name in told]
    return complaints


def volume_complaints(manifests: list[Manifest]) -> list[str]:
    """Volumes that aren't mounted, and containers of ours that couldn't write where they must."""
    complaints = []
    for workload, template in pods(manifests):
        held = {v["name"] for v in template["spec"].get("volumes") or []}
        held |= {c["metadata"]["name"] for c in workload["spec"].get("volumeClaimTemplates") or []}
        mounted = {m["name"] for c in containers(template) for m in c.get("volumeMounts", [])}
        complaints += [f"{name_of(workload)}: {name} is mounted nowhere" for name in sorted(held - mounted)]
        complaints += [f"{name_of(workload)}: there is no volume {name}" for name in sorted(mounted - held)]
        for container in filter(is_ours, containers(template)):
            paths = {m["mountPath"] for m in container.get("volumeMounts", []) if not m.get("readOnly")}
            if "args" in container and not {"/var/lib/fraudgate", "/tmp"} <= paths:  # noqa: S108
                complaints.append(f"{name_of(workload)}: {container['name']} can't write its home or /tmp")
    return complaints


def resource_complaints(manifests: list[Manifest]) -> list[str]:
    """Containers without requests, or without a limit of memory, or with one of CPU, which makes every tail longer."""
    complaints = []
    for workload, template in pods(manifests):
        for container in containers(template):
            resources, where = container.get("resources", {}), f"{name_of(workload)}: {container['name']}"
            if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
                complaints.append(f"{where} doesn't say what it needs")
            if "cpu" in resources.get("limits", {}):
                complaints.append(f"{where} is throttled")
    return complaints


def leaving_complaints(manifests: list[Manifest]) -> list[str]:
    """Gateways that are killed before they have drained, or told to leave before their callers know."""
    complaints = []
    for workload, template in pods(manifests):
        for container in template["spec"]["containers"]:
            if container["name"] != "gateway":
                continue
            pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if pause < 1:
                complaints.append(f"{name_of(workload)}: SIGTERM comes while requests are still sent here")
            if template["spec"]["terminationGracePeriodSeconds"] < pause + LEAVE_TIMEOUT_S:
                complaints.append(f"{name_of(workload)}: it is killed before {pause} s and {LEAVE_TIMEOUT_S} s are over")
    return complaints


def network_complaints(manifests: list[Manifest]) -> list[str]:
    """Pods that no policy shuts, ports of Services within the release that may not be reached from where an address names them."""
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    if not policies:
        return []
    complaints = []
    for workload, template in pods(manifests):
        labels = template["metadata"]["labels"].items()
        shut = {
            kind
            for p in policies
            if p["spec"]["podSelector"].get("matchLabels", {}).items() <= labels and not {"ingress", "egress"} & p["spec"].keys()
            for kind in p["spec"]["policyTypes"]
        }
        if shut != {"Ingress", "Egress"}:
            complaints.append(f"{name_of(workload)}: nothing shuts its network")
    return complaints + _unreachable(manifests, policies)


def _unreachable(manifests: list[Manifest], policies: list[Manifest]) -> list[str]:
    services = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Service"}
    complaints = []
    for workload, template in pods(manifests):
        labels = template["metadata"]["labels"].items()
        mine = [p for p in policies if p["spec"]["podSelector"].get("matchLabels", {}).items() <= labels]
        rules = [rule for p in mine for rule in p["spec"].get("egress", [])]
        for container in containers(template):
            named = {
                (name, host, int(port))
                for name, value in environment(container, manifests).items()
                for host, port in re.findall(r"([a-z][a-z0-9-]+):(\d+)", value)
                if host in services and _needed(workload, name)
            }
            for name, host, port in sorted(named):
                selector, behind = services[host]["spec"]["selector"], _behind(services[host], port, manifests)
                if not any(_allows(rule, selector, behind) for rule in rules):
                    complaints.append(f"{name_of(workload)}: {name} names {host}:{port}, which it may not reach")
    return complaints


def _behind(service: Manifest, port: int, manifests: list[Manifest]) -> int:
    """The container's port behind a Service's: a policy sees packets that are addressed to the pod already. -1: there is none."""
    target = next((p.get("targetPort", port) for p in service["spec"]["ports"] if p["port"] == port), -1)
    if isinstance(target, int):
        return target
    chosen = service["spec"]["selector"].items()
    held = (
        p
        for _, template in pods(manifests)
        if chosen <= template["metadata"]["labels"].items()
        for c in containers(template)
        for p in c.get("ports", [])
    )
    return next((int(p["containerPort"]) for p in held if p.get("name") == target), -1)


def _needed(workload: Manifest, name: str) -> bool:
    """Every ConfigMap has every address; a component that never asks Redis or MLflow need not reach it."""
    component = workload["metadata"]["labels"]["app.kubernetes.io/component"]
    if "CONSOLE" in name:
        return bool(component == "gateway")
    never = {
        "cases": ("REDIS", "MLFLOW", "AWS"),
        "topics": ("REDIS", "MLFLOW", "AWS"),
        "retrain": ("REDIS", "KAFKA", "REGISTRY"),
        "train": ("REDIS", "KAFKA", "REGISTRY"),
        "maintain": ("REDIS", "MLFLOW"),
        "kafka": ("KAFKA",),
    }
    return not any(part in name for part in never.get(component, ()))


def _allows(rule: Manifest, selector: Manifest, port: int) -> bool:
    ports = [p["port"] for p in rule.get("ports", [])]
    peers = rule.get("to")
    if ports and port not in ports:
        return False
    return peers is None or any(p.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= selector.items() for p in peers)


RULES = (
    service_complaints,
    probe_complaints,
    setting_complaints,
    security_complaints,
    volume_complaints,
    resource_complaints,
    leaving_complaints,
    network_complaints,
)
