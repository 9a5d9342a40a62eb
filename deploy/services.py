"""What the local stack is made of: for each service its ports, files, command line and health check.

`local_services` names what these settings ask to run here. A service whose address is set (kafka_bootstrap, redis_url, ...) is
somebody else's and is left alone. `deploy.stack` starts and stops what stands here.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from deploy import forks, kafka_config
from deploy.monitoring import config as monitoring
from deploy.monitoring import rules
from deploy.rollout.proxy import SOCKET_PATH_MAX, Proxy, configuration, socket_path
from deploy.rollout.state import BLUE, GREEN, SERVICE_OF, State, port_of, read_state, slot_command
from deploy.toolchain import ToolMissingError, find_alertmanager, find_haproxy, find_prometheus, find_redis, java_home
from gateway.contracts.settings import ENV_PREFIX, Settings, settings_env

PROBE_TIMEOUT_S = 2.0
REGISTRY_HEAP_MB = 256
REGISTRY_ARCHIVE = "apicurio-registry-app-2.6.13.Final-all.tar.gz"
REGISTRY_JAR = "apicurio-registry-app-2.6.13.Final-runner.jar"


class ServiceFilesError(RuntimeError):
    """Something that a service needs to start isn't there. The message says how to get it."""


@dataclass(frozen=True)
class Service:
    """`ports` maps each setting to the port it gives, the one that clients use first. `prepare` writes files, once or each time.

    `command` returns the argument list and the environment. `healthy` asks in the service's own protocol and takes at most a few
    seconds. `core` services start first; the others need them. One that is not `wanted` is started by its name alone.
    """

    name: str
    ports: dict[str, int]
    prepare: Callable[[], None]
    command: Callable[[], tuple[list[str], dict[str, str]]]
    healthy: Callable[[], bool]
    ready_within_s: float
    stop_within_s: float
    core: bool = True
    niceness: int = 0
    wanted: bool = True
    # Finds the program, or raises `ToolMissingError`: fraudgate up goes on without a service that only some machines have.
    find: Callable[[], object] | None = None

    @property
    def port(self) -> int:
        return next(iter(self.ports.values()))

    @property
    def missing(self) -> str | None:
        """Why it can't be had on this machine."""
        try:
            if self.find is not None:
                self.find()
        except ToolMissingError as exc:
            return str(exc)
        return None


def local_services(settings: Settings) -> dict[str, Service]:
    """The services to run here, by name, in the order to start them."""
    found = []
    if not settings.kafka_bootstrap:
        found.append(_kafka(settings))
    if not settings.redis_url:
        found.append(_redis(settings))
    if not settings.registry_url:
        found.append(_registry(settings))
    if not settings.mlflow_url:
        found.append(_mlflow(settings))
    state = read_state(settings.home_path)
    found += [_jobs(settings), _gateway(settings, BLUE, state), _gateway(settings, GREEN, state), _proxy(settings, state)]
    found.append(_cases(settings))
    if not settings.alertmanager_url:
        found.append(_alertmanager(settings))
    if not settings.prometheus_url:
        found.append(_prometheus(settings))
    return {service.name: service for service in found}


def data_path(settings: Settings, name: str) -> Path:
    return settings.home_path / "data" / name


def _kafka(settings: Settings) -> Service:
    """One KRaft node that is broker and controller. Its cluster id is drawn at the first start, which formats the directory."""
    data = data_path(settings, "kafka")
    properties, logging, release = data / "server.properties", data / "log4j2.properties", data / "release"

    def java(main: str, *arguments: str) -> list[str]:
        jars = settings.jars_path / "kafka"
        if not any(jars.glob("kafka_*.jar")):
            raise ServiceFilesError(f"Kafka's jars are not in {jars}: run make setup")
        launcher = str(java_home(settings.cache_path) / "bin/java")
        return [launcher, *kafka_config.JAVA_OPTIONS, f"-Dlog4j2.configurationFile={logging}", "-cp", f"{jars}/*", main, *arguments]

    def prepare() -> None:
        properties.write_text(kafka_config.properties(settings, data / "log"))
        logging.write_text(kafka_config.LOGGING)
        if (data / "log/meta.properties").exists():
            _check_release(data, release)
            return
        # A format that was interrupted leaves a directory without meta.properties, which may be formatted again.
        cluster_id = "f" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
        argv = java("kafka.tools.StorageTool", "format", "--cluster-id", cluster_id, "--config", str(properties))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise ServiceFilesError(f"Kafka's data directory {data} could not be formatted:\n{done.stdout}{done.stderr}")
        release.write_text(kafka_config.RELEASE)

    def healthy() -> bool:
        if not _listens(settings.host, settings.kafka_port):
            return False
        admin = AdminClient({"bootstrap.servers": f"{settings.host}:{settings.kafka_port}", "log_level": 0})
        try:
            return bool(admin.list_topics(timeout=PROBE_TIMEOUT_S).brokers)
        except KafkaException:
            return False

    return Service(
        name="kafka",
        ports={
            ENV_PREFIX + "KAFKA_PORT": settings.kafka_port,
            ENV_PREFIX + "KAFKA_CONTROLLER_PORT": settings.kafka_controller_port,
        },
        prepare=prepare,
        command=lambda: (java("kafka.Kafka", str(properties)), _plain_env()),
        healthy=healthy,
        ready_within_s=90,
        stop_within_s=20,
        niceness=settings.broker_niceness,
    )


def _check_release(data: Path, release: Path) -> None:
    """Raises `ServiceFilesError` for a directory that a later Kafka has formatted, which the broker would end over with a stack trace."""
    found = release.read_text().strip() if release.exists() else "4.3"
    if tuple(map(int, found.split("."))) > tuple(map(int, kafka_config.RELEASE.split("."))):
        raise ServiceFilesError(
            f"{data} was written by Kafka {found}, and Fraudgate runs {kafka_config.RELEASE} now, which can't read it: move it away, and "
            "Kafka starts empty (what the feature jobs have taken is in the tables)"
        )


def _redis(settings: Settings) -> Service:
    """An append-only file keeps every acknowledged write when the process is killed: it is written before the reply.

    Not so with `appendfsync everysec`: while its fsync is under way, Redis acknowledges writes that it still holds in memory. With
    `no` the kernel decides when they reach the disk (within about 30 s), which matters only when the machine itself fails.
    """
    data = data_path(settings, "redis")
    config = data / "redis.conf"

    def prepare() -> None:
        values = {
            "bind": settings.host,
            "port": settings.redis_port,
            "dir": f'"{data}"',
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "no",
            # Writing the file anew takes a core for seconds, from those who pay then, and 2,000 payments a second add 8 MB each second.
            # Compressing would take half as long again. Reading it back took 8 s in the soak, in which Redis was killed.
            "auto-aof-rewrite-min-size": "1gb",
            "auto-aof-rewrite-percentage": 200,
            "rdbcompression": "no",
            "save": '""',
            "maxmemory": f"{settings.redis_memory_mb}mb",
            "maxmemory-policy": "noeviction",
            "tcp-keepalive": 60,
            # What `redis-cli latency doctor` tells of: a payment waits 40 ms for Redis at most.
            "latency-monitor-threshold": 10,
        }
        config.write_text("".join(f"{name} {value}\n" for name, value in values.items()))

    def healthy() -> bool:
        try:
            with socket.create_connection((settings.host, settings.redis_port), timeout=PROBE_TIMEOUT_S) as connection:
                connection.sendall(b"PING\r\n")
                # While it reads its file it answers -LOADING.
                return connection.recv(64) == b"+PONG\r\n"
        except OSError:
            return False

    return Service(
        name="redis",
        ports={ENV_PREFIX + "REDIS_PORT": settings.redis_port},
        prepare=prepare,
        command=lambda: (
            [sys.executable, "-I", forks.__file__, str(find_redis()), str(config)],
            _plain_env(),
        ),
        healthy=healthy,
        # It reads its file first, which may be three times what it holds.
        ready_within_s=180,
        stop_within_s=20,
    )


def _registry(settings: Settings) -> Service:
    """Apicurio, its schemas in an H2 file that each write reaches at once, so that ids stay what they were over a restart."""
    data = data_path(settings, "registry")
    program = settings.cache_path / "registry" / REGISTRY_ARCHIVE.removesuffix(".tar.gz")

    def prepare() -> None:
        if program.is_dir():
            return
        archive = settings.jars_path / "registry" / REGISTRY_ARCHIVE
        if not archive.exists():
            raise ServiceFilesError(f"the schema registry's archive is not in {archive.parent}: run make setup")
        partial = program.with_name(f"{program.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            # Debian 12's Python 3.11.2 has no filters yet, and 3.12 warns without one. The archive's hash was checked.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(partial)  # noqa: S202
        try:
            partial.rename(program)
        except OSError:
            # Another start was first.
            shutil.rmtree(partial)

    def command() -> tuple[list[str], dict[str, str]]:
        env = _plain_env() | {
            "QUARKUS_HTTP_HOST": settings.host,
            "QUARKUS_HTTP_PORT": str(settings.registry_port),
            "QUARKUS_DATASOURCE_JDBC_URL": f"jdbc:h2:file:{data}/registry;WRITE_DELAY=0",
            "QUARKUS_LOG_LEVEL": "WARN",
            "REGISTRY_LOG_LEVEL": "WARN",
        }
        options = [f"-Xmx{REGISTRY_HEAP_MB}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        return [str(java_home(settings.cache_path) / "bin/java"), *options, "-jar", str(program / REGISTRY_JAR)], env

    return Service(
        name="registry",
        ports={ENV_PREFIX + "REGISTRY_PORT": settings.registry_port},
        prepare=prepare,
        command=command,
        healthy=lambda: http_ok(f"{settings.registry}/subjects"),
        ready_within_s=90,
        stop_within_s=10,
    )


def _mlflow(settings: Settings) -> Service:
    """MLflow on a SQLite file; artifacts go through the server into its directory. It runs no jobs, which would be 8 processes."""
    data = data_path(settings, "mlflow")

    def command() -> tuple[list[str], dict[str, str]]:
        argv = [sys.executable, "-m", "deploy.mlflow_server", settings.host, str(settings.mlflow_port), str(data)]
        return argv, _plain_env() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    return Service(
        name="mlflow",
        ports={ENV_PREFIX + "MLFLOW_PORT": settings.mlflow_port},
        prepare=lambda: (data / "artifacts").mkdir(exist_ok=True),
        command=command,
        healthy=lambda: http_ok(f"{settings.mlflow}/health"),
        # The first start imports 1 GB of packages from a cold disk and creates the tables.
        ready_within_s=180,
        stop_within_s=10,
    )


def _jobs(settings: Settings) -> Service:
    return Service(
        name="jobs",
        ports={ENV_PREFIX + "JOBS_PORT": settings.jobs_port},
        prepare=_nothing,
        command=lambda: ([sys.executable, "-m", "deploy.cli", "jobs"], _own_env(settings)),
        healthy=lambda: streams_run(f"http://{settings.host}:{settings.jobs_port}/metrics"),
        ready_within_s=180,
        stop_within_s=60,
        core=False,
        niceness=settings.jobs_niceness,
    )


def _gateway(settings: Settings, slot: str, state: State | None) -> Service:
    """One of the two places for a gateway. What runs in it, and which of them `fraudgate up` starts, is what was deployed last."""
    port = port_of(settings, slot)

    def command() -> tuple[list[str], dict[str, str]]:
        argv, env = slot_command(settings, slot, read_state(settings.home_path))
        return argv, _plain_env() | env | {"PYTHONUNBUFFERED": "1"}

    return Service(
        name=SERVICE_OF[slot],
        ports={ENV_PREFIX + ("GATEWAY_PORT" if slot == BLUE else "GATEWAY_GREEN_PORT"): port},
        prepare=_nothing,
        command=command,
        healthy=lambda: http_ok(f"http://{settings.host}:{port}/readyz"),
        ready_within_s=60,
        stop_within_s=20,
        core=False,
        wanted=slot == (BLUE if state is None else state.active),
    )


def _proxy(settings: Settings, state: State | None) -> Service:
    """HAProxy before the two places. It knows from its start which of them has the traffic."""
    config = data_path(settings, "proxy") / "haproxy.cfg"

    def prepare() -> None:
        path = socket_path(settings)
        if len(str(path)) > SOCKET_PATH_MAX:
            raise ServiceFilesError(f"the path {path} is too long for a socket: set {ENV_PREFIX}HOME to a shorter one")
        config.write_text(configuration(settings, read_state(settings.home_path)))

    return Service(
        name="proxy",
        ports={ENV_PREFIX + "PROXY_PORT": settings.proxy_port},
        prepare=prepare,
        # -db: in the foreground.
        command=lambda: ([str(find_haproxy()), "-db", "-f", str(config)], _plain_env()),
        healthy=lambda: Proxy(socket_path(settings)).answers,
        ready_within_s=15,
        stop_within_s=5,
        core=False,
        wanted=state is not None,
    )


def _cases(settings: Settings) -> Service:
    return Service(
        name="cases",
        ports={ENV_PREFIX + "CASES_PORT": settings.cases_port},
        prepare=_nothing,
        command=lambda: ([sys.executable, "-m", "deploy.cli", "cases"], _own_env(settings)),
        healthy=lambda: http_ok(f"{settings.cases}/readyz"),
        ready_within_s=60,
        stop_within_s=20,
        core=False,
    )


def _prometheus(settings: Settings) -> Service:
    """Reads the metrics of all processes here and evaluates the alerts. What it keeps is bounded in days and in bytes."""
    data = data_path(settings, "prometheus")
    rules_path, file = data / "rules.yml", data / "prometheus.yml"

    def prepare() -> None:
        rules_path.write_text(rules.text(monitoring.runbooks_of(settings)))
        file.write_text(monitoring.prometheus_yml(settings, rules_path))

    def command() -> tuple[list[str], dict[str, str]]:
        options = {
            "config.file": file,
            "storage.tsdb.path": data / "tsdb",
            "storage.tsdb.retention.time": f"{settings.prometheus_keep_days}d",
            "storage.tsdb.retention.size": f"{settings.prometheus_keep_mb}MB",
            "web.listen-address": f"{settings.host}:{settings.prometheus_port}",
        }
        return [str(find_prometheus()), *(f"--{name}={value}" for name, value in options.items())], _plain_env()

    return Service(
        name="prometheus",
        ports={ENV_PREFIX + "PROMETHEUS_PORT": settings.prometheus_port},
        prepare=prepare,
        command=command,
        healthy=lambda: http_ok(f"http://{settings.host}:{settings.prometheus_port}/-/ready"),
        ready_within_s=60,
        stop_within_s=20,
        core=False,
        niceness=settings.jobs_niceness,
        find=find_prometheus,
    )


def _alertmanager(settings: Settings) -> Service:
    """Groups alerts and sends them on. One by itself: it listens to no others."""
    data = data_path(settings, "alertmanager")
    file = data / "alertmanager.yml"

    def command() -> tuple[list[str], dict[str, str]]:
        options = {
            "config.file": file,
            "storage.path": data / "state",
            "web.listen-address": f"{settings.host}:{settings.alertmanager_port}",
            # Else it listens on 0.0.0.0:9094.
            "cluster.listen-address": "",
        }
        return [str(find_alertmanager()), *(f"--{name}={value}" for name, value in options.items())], _plain_env()

    def prepare() -> None:
        file.write_text(monitoring.alertmanager_yml(settings))

    return Service(
        name="alertmanager",
        ports={ENV_PREFIX + "ALERTMANAGER_PORT": settings.alertmanager_port},
        prepare=prepare,
        command=command,
        healthy=lambda: http_ok(f"http://{settings.host}:{settings.alertmanager_port}/-/ready"),
        ready_within_s=30,
        stop_within_s=10,
        core=False,
        find=find_alertmanager,
    )


def _nothing() -> None:
    """What a service prepares that needs no files."""


def _plain_env() -> dict[str, str]:
    """This process's environment without our settings, which say nothing to a foreign program."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def _own_env(settings: Settings) -> dict[str, str]:
    return _plain_env() | settings_env(settings) | {"PYTHONUNBUFFERED": "1"}


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def http_ok(url: str) -> bool:
    """True when GET `url` answers with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def streams_run(url: str) -> bool:
    """True when the feature jobs' metrics say that every stream runs. The metrics answer long before Spark has started."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as reply:  # noqa: S310
            lines = reply.read().decode().splitlines()
    except (OSError, ValueError):
        return False
    states = [line.rpartition(" ")[2] for line in lines if line.startswith("fraudgate_jobs_up{")]
    return bool(states) and all(float(state) == 1 for state in states)
