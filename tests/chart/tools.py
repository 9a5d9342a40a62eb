"""helm, kubectl, kube-apiserver and etcd, built from their Go modules into the cache. Called by the tests of the chart.

Nothing else here has them, and a wheel or a Debian package of a Kubernetes API server doesn't exist. The first build takes a quarter of an
hour of two cores and 3 GB of disk; afterwards the programs are found. By hand: `python -m tests.chart.tools`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.settings import load_settings

KUBERNETES_VERSION = "1.36.3"
HELM_VERSION = "3.22.0"
# Its definitions of ServiceMonitor and PrometheusRule, as a cluster with the operator has them.
OPERATOR_MODULE, OPERATOR_VERSION = "github.com/prometheus-operator/prometheus-operator", "0.85.0"
DEFINITIONS = ("servicemonitors", "prometheusrules")
BUILD_TIMEOUT_S = 2 * 3600
# Programs that one Go module builds together, by package. etcd comes in the version that Kubernetes itself is tested with.
KUBERNETES_PACKAGES = {
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "etcd": "go.etcd.io/etcd/server/v3",
}


class ToolsError(RuntimeError):
    """The programs can't be built here. The message says why."""


@dataclass(frozen=True)
class Tools:
    """Paths of the programs, and of the files that define the operator's kinds."""

    helm: Path
    kubectl: Path
    apiserver: Path
    etcd: Path
    definitions: tuple[Path, ...]


def tools_path() -> Path:
    """The folder of this version's programs. FRAUDGATE_CACHE_DIR moves it."""
    return load_settings().cache_path / f"kubernetes/{KUBERNETES_VERSION}"


def tools() -> Tools:
    """Where the programs are, or would be."""
    root = tools_path()
    definitions = tuple(root / f"monitoring.coreos.com_{name}.yaml" for name in DEFINITIONS)
    return Tools(root / f"helm-{HELM_VERSION}", root / "kubectl", root / "kube-apiserver", root / "etcd", definitions)


def complete(found: Tools) -> bool:
    """Whether all of them are built."""
    return all(path.is_file() for path in (found.helm, found.kubectl, found.apiserver, found.etcd, *found.definitions))


def build_tools() -> Tools:
    """Build what is missing, one process at a time. Raises `ToolsError`."""
    go = shutil.which("go")
    if go is None:
        raise ToolsError("Go is missing, which builds helm and the Kubernetes API server: install golang 1.26 or later")
    root = tools_path()
    root.mkdir(parents=True, exist_ok=True)
    with (root.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _helm(go, root)
        _definitions(go, root)
        _kubernetes(go, root)
    found = tools()
    assert complete(found), "each part was just put there"
    return found


def _helm(go: str, root: Path) -> None:
    target = root / f"helm-{HELM_VERSION}"
    if target.is_file():
        return
    partial = root / "helm.partial"
    _run([go, "install", f"helm.sh/helm/v3/cmd/helm@v{HELM_VERSION}"], root, GOBIN=str(partial))
    (partial / "helm").rename(target)


def _definitions(go: str, root: Path) -> None:
    module = None
    for name in DEFINITIONS:
        target = root / f"monitoring.coreos.com_{name}.yaml"
        if target.is_file():
            continue
        module = module or _downloaded(go, root, f"{OPERATOR_MODULE}@v{OPERATOR_VERSION}", "Dir")
        partial = target.with_suffix(".partial")
        partial.write_bytes((module / "example/prometheus-operator-crd" / target.name).read_bytes())
        partial.rename(target)


def _kubernetes(go: str, root: Path) -> None:
    """One module that requires k8s.io/kubernetes. What that replaces by folders of its own is to be had as modules."""
    missing = {name: package for name, package in KUBERNETES_PACKAGES.items() if not (root / name).is_file()}
    if not missing:
        return
    source = root / "source"
    source.mkdir(exist_ok=True)
    described = _downloaded(go, root, f"k8s.io/kubernetes@v{KUBERNETES_VERSION}", "GoMod").read_text()
    staging = sorted(set(re.findall(r"^\s*(k8s\.io/\S+) => \./staging/", described, re.MULTILINE)))
    if not staging:
        raise ToolsError("k8s.io/kubernetes names no staging modules: its layout has changed")
    minor = KUBERNETES_VERSION.removeprefix("1.")
    version = re.search(r"^go (\S+)$", described, re.MULTILINE)
    lines = ["module fraudgate.invalid/tools", f"go {version[1] if version else '1.26'}"]
    lines += [f"require k8s.io/kubernetes v{KUBERNETES_VERSION}", "replace ("]
    lines += [f"\t{name} => {name} v0.{minor}" for name in staging]
    (source / "go.mod").write_text("\n".join([*lines, ")", ""]))
    imports = "".join(f'\t_ "{package}"\n' for package in KUBERNETES_PACKAGES.values())
    (source / "tools.go").write_text(f"//go:build tools\n\npackage tools\n\nimport (\n{imports})\n")
    stamp = f"-X k8s.io/component-base/version.gitVersion=v{KUBERNETES_VERSION}"
    for name, package in missing.items():
        partial = root / f"{name}.partial"
        # Without symbols: half the size, and a faster link.
        _run([go, "build", "-ldflags", f"-s -w {stamp}", "-o", str(partial), package], source, GOFLAGS="-mod=mod", CGO_ENABLED="0")
        partial.rename(root / name)


def _downloaded(go: str, cwd: Path, module: str, what: str) -> Path:
    text = _run([go, "mod", "download", "-json", module], cwd)
    return Path(json.loads(text)[what])


def _run(argv: list[str], cwd: Path, **env: str) -> str:
    """Standard output. Raises `ToolsError`."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=os.environ | env,
            capture_output=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise ToolsError(f"{' '.join(argv)} did not end within two hours") from exc
    if done.returncode != 0:
        raise ToolsError(f"{' '.join(argv)} failed:\n{done.stderr.decode(errors='replace')[-4000:]}")
    return done.stdout.decode()


if __name__ == "__main__":
    try:
        print(build_tools())
    except ToolsError as error:
        sys.exit(f"tools: {error}")
