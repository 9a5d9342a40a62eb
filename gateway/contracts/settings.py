"""Every setting, typed, with its unit, range and default. Read once at start from FRAUDGATE_* environment variables.

`docs/settings.md` is generated from this file. A bad value is named with its allowed range.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from gateway.contracts.setting_kinds import BROKERS, HOST, HTTP_URL, NAME, PORT_MAX, REDIS_URL, TEXT, Kind, one_of

ENV_PREFIX = "FRAUDGATE_"
EXACTLY_ONCE, AT_LEAST_ONCE = "exactly_once", "at_least_once"
# Who sees the console: whoever a key or this machine makes one of ours, everybody, nobody.
CONSOLE_GUARDED, CONSOLE_OPEN, CONSOLE_OFF = "guarded", "open", "off"
CLIENT_KEY_LENGTH_MAX = 128
DIGITS = re.compile(r"-?[0-9]{1,18}")
# Of a value that is refused.
SHOWN_CHARS_MAX = 40


class SettingError(ValueError):
    """A setting has a value it can't have. The message names the variable and what is allowed."""


def _setting(default: Any, doc: str, *, least: float | None = None, most: float | None = None, kind: Kind = TEXT) -> Any:
    return field(default=default, metadata={"doc": doc, "least": least, "most": most, "kind": kind})


def _port(default: int, doc: str) -> Any:
    return _setting(default, doc, least=1, most=PORT_MAX)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each field is the environment variable FRAUDGATE_<NAME IN CAPITALS>. Empty text means: derived, as the doc says."""

    home: str = _setting(".fraudgate", "directory of everything that runs here: data, logs, tables, models, checkpoints")
    cache_dir: str = _setting("~/.cache/fraudgate", "directory of what was downloaded (jars), shared between checkouts")
    maven_url: str = _setting("", "mirror of Maven Central that make setup fetches the jars from; empty: Maven Central itself")
    data_dir: str = _setting(
        "../shared/data", "directory of the public data sets, for replays and tests that are left out without it"
    )
    host: str = _setting("127.0.0.1", "address that every server listens on", kind=HOST)

    kafka_port: int = _port(19092, "port of the local Kafka broker")
    kafka_controller_port: int = _port(19093, "port of the local Kafka controller")
    redis_port: int = _port(16379, "port of the local Redis")
    registry_port: int = _port(18081, "port of the local schema registry")
    mlflow_port: int = _port(15000, "port of the local MLflow server")
    gateway_port: int = _port(18080, "port of the gateway, the first of the two that fraudgate deploy swaps")
    gateway_green_port: int = _port(18084, "port of the second")
    proxy_port: int = _port(18070, "port of the local proxy before the two, which callers use so that they notice no deploy")
    cases_port: int = _port(18082, "port of the case service")
    jobs_port: int = _port(18090, "port of the feature jobs' metrics")
    parity_port: int = _port(18091, "port of the metrics of fraudgate parity --live")

    prometheus_port: int = _port(19190, "port of the local Prometheus")
    alertmanager_port: int = _port(19191, "port of the local Alertmanager")

    redis_memory_mb: int = _setting(
        1024, "most memory of the local Redis, MiB; writes beyond it are refused, nothing is evicted", least=16, most=1_048_576
    )

    kafka_bootstrap: str = _setting("", "Kafka brokers, host:port separated by commas; empty: the local broker", kind=BROKERS)
    redis_url: str = _setting(
        "",
        "Redis, redis://host:port/db, or a Redis Cluster, redis+cluster://host:port,host:port,...; empty: the local one",
        kind=REDIS_URL,
    )
    registry_url: str = _setting("", "root of the Confluent-compatible registry; empty: the local one", kind=HTTP_URL)
    mlflow_url: str = _setting("", "MLflow tracking and registry; empty: the local server")
    gateway_url: str = _setting(
        "",
        "root of the gateway that our own commands ask; empty: the local proxy where fraudgate deploy has started one, else the gateway",
        kind=HTTP_URL,
    )
    prometheus_url: str = _setting("", "Prometheus that fraudgate alerts asks; empty: the local one", kind=HTTP_URL)
    alertmanager_url: str = _setting("", "Alertmanager that the local Prometheus tells; empty: the local one", kind=HTTP_URL)

    prometheus_scrape_ms: int = _setting(
        5000, "how often the local Prometheus reads the metrics, milliseconds", least=100, most=60_000
    )
    prometheus_evaluate_ms: int = _setting(15_000, "how often it evaluates the alerts, milliseconds", least=100, most=60_000)
    prometheus_keep_days: int = _setting(15, "how long it keeps metrics, days; a burn rate looks back 3", least=1, most=3650)
    prometheus_keep_mb: int = _setting(1024, "most disk that it takes, MiB", least=64, most=1_048_576)
    alert_page_url: str = _setting("", "webhook of the local Alertmanager for what pages; empty: nobody is paged", kind=HTTP_URL)
    alert_ticket_url: str = _setting("", "webhook for what can wait for the morning; empty: it goes nowhere", kind=HTTP_URL)
    alert_token_path: str = _setting("", "file with the bearer token for those webhooks, read by Alertmanager; empty: none is sent")
    alert_group_wait_ms: int = _setting(30_000, "its wait for more of the same alert, milliseconds", least=100, most=600_000)
    alert_repeat_m: int = _setting(240, "how often an alert that goes on is told again, minutes", least=1, most=10_080)
    runbooks_url: str = _setting(
        "", "where the runbooks lie, for links in alerts; empty: docs/runbooks of this checkout, as file://"
    )

    kafka_partitions: int = _setting(4, "partitions of each topic that fraudgate creates", least=1, most=1024)
    kafka_replication: int = _setting(1, "replicas of each topic that fraudgate creates", least=1, most=16)
    consumer_group: str = _setting("fraudgate-gateway", "consumer group of the Kafka door", kind=NAME)
    instance_id: str = _setting("0", "name of this gateway among its replicas; its Kafka transactions are fenced by it", kind=NAME)

    kafka_delivery: str = _setting(
        "exactly_once",
        "how the Kafka door commits: exactly_once, in transactions, or at_least_once, which is faster and may repeat receipts after"
        " a crash",
        kind=one_of(EXACTLY_ONCE, AT_LEAST_ONCE),
    )
    kafka_chunk_interval_ms: int = _setting(
        20,
        "least time between the beginnings of two Kafka transactions that aren't full, milliseconds: each takes milliseconds of CPU, the"
        " broker's above all",
        least=0,
        most=1000,
    )
    kafka_watchdog_s: int = _setting(
        60,
        "how long a partition with something to consume may stand still before the Kafka door starts anew, and as long again until the"
        " process ends, seconds; 0: for ever",
        least=0,
        most=3600,
    )

    tables_uri: str = _setting("", "root of the Delta tables, a directory or s3a://bucket/prefix; empty: <home>/tables")
    checkpoints_uri: str = _setting("", "root of the streaming checkpoints; empty: <home>/checkpoints")
    model_dir: str = _setting("", "the gateway's local model directory; empty: <home>/models")
    model_signing_key_path: str = _setting(
        "", "private Ed25519 key (PEM) that fraudgate train signs models with; empty: models aren't signed"
    )
    model_public_key_path: str = _setting(
        "", "public Ed25519 key (PEM); with it fraudgate pull refuses a model that isn't signed by its owner; empty: any is taken"
    )
    policy_path: str = _setting("", "the policy's folder (docs/policy.md); empty: the one that ships with the gateway")

    api_keys_path: str = _setting(
        "", "file of the API keys (fraudgate keys) that POST /score and the case service ask for; empty: nobody is asked for one"
    )
    client_key_path: str = _setting(
        "", "file that holds the one API key which fraudgate score, simulate, replay and loadtest send; empty: they send none"
    )

    console_access: str = _setting(
        "guarded",
        "who may see the live console: guarded, a key of scope review or admin, or without API keys this machine alone; open, everybody"
        " who reaches the gateway's port; off, nobody",
        kind=one_of(CONSOLE_GUARDED, CONSOLE_OPEN, CONSOLE_OFF),
    )
    console_viewers_max: int = _setting(16, "most browsers that one gateway process shows the console to", least=1, most=1000)
    console_jobs_url: str = _setting(
        "", "where the console asks the feature jobs for their metrics; empty: the local ones", kind=HTTP_URL
    )
    console_cases_url: str = _setting("", "root of the case service that the console asks; empty: the local one", kind=HTTP_URL)

    challenger_share_permille: int = _setting(
        100,
        "part of the cards that a challenger gets where the model directory has no routing.json (fraudgate route), per mille",
        least=0,
        most=1000,
    )
    explore_share_permille: int = _setting(
        0,
        "part of what the model's score alone declines that is approved to learn its label, likewise, per mille",
        least=0,
        most=1000,
    )
    explore_amount_max_minor: int = _setting(
        0, "largest amount that is so explored, likewise, minor units", least=0, most=1_000_000_000_000
    )
    explore_loss_max_minor_per_day: int = _setting(
        0, "most that is so approved in a UTC day, by all gateways together, likewise, minor units", least=0, most=1_000_000_000_000
    )

    idempotency_window_s: int = _setting(600, "how long a retry gets the same answer, seconds", least=1, most=86_400)
    batch_rows_max: int = _setting(256, "most transactions in one micro-batch", least=1, most=512)
    batch_interval_ms: int = _setting(
        6,
        "least time between the beginnings of two micro-batches over HTTP of less than 64, milliseconds; the first after a pause begins at"
        " once, and so does one with a payment whose deadline leaves no time to wait; more on a machine whose cores are full: each batch"
        " costs 1 to 2 ms of CPU beside its rows",
        least=0,
        most=50,
    )
    in_flight_max: int = _setting(4096, "most transactions accepted and not yet answered", least=1, most=100_000)
    connections_max: int = _setting(10_000, "most open connections of one gateway process", least=1, most=1_000_000)
    request_timeout_ms: int = _setting(
        10_000, "longest time for one HTTP request to arrive or its answer to be read, milliseconds", least=10, most=600_000
    )
    keep_alive_s: int = _setting(75, "how long a connection may be idle, seconds", least=1, most=86_400)
    decision_budget_ms: int = _setting(80, "time to answer in, milliseconds", least=5, most=10_000)
    feature_budget_ms: int = _setting(40, "part of it to wait for Redis, milliseconds", least=1, most=10_000)
    publish_budget_ms: int = _setting(
        40,
        "longest wait for Kafka to acknowledge a receipt before an HTTP reply, milliseconds, where the local log can't take it",
        least=0,
        most=10_000,
    )
    publish_linger_ms: int = _setting(
        50, "how long receipts collect in the local log before they are sent to Kafka together, milliseconds", least=0, most=1000
    )
    publish_buffer_max: int = _setting(100_000, "most receipts waiting for Kafka in memory", least=1, most=10_000_000)
    spool_mb_max: int = _setting(
        256,
        "most that the local log holds of what Kafka hasn't acknowledged, MiB; 0: no log, receipts wait in memory alone",
        least=0,
        most=1_048_576,
    )
    spool_dir: str = _setting("", "directory of the local log, a folder in it for each process; empty: <home>/spool")
    spool_sync_ms: int = _setting(
        1000,
        "how old a receipt that Kafka hasn't acknowledged may get before the local log is synchronised to the disk, milliseconds; what"
        " is younger is lost when the machine fails. 0: when the kernel does",
        least=0,
        most=600_000,
    )

    trace_url: str = _setting(
        "",
        "collector that traces of decisions are sent to by OTLP over HTTP, for instance http://127.0.0.1:4318; empty: nothing is traced",
        kind=HTTP_URL,
    )
    trace_sample_permille: int = _setting(
        1,
        "part of the transactions that are traced although their caller says nothing of a trace, by the hash of their transaction_id, per"
        " mille",
        least=0,
        most=1000,
    )
    trace_per_s_max: int = _setting(100, "most decisions traced by one process, whoever asks, a second", least=1, most=10_000)
    trace_waiting_max: int = _setting(
        1000, "most traced decisions waiting for the collector; more are dropped", least=1, most=100_000
    )

    cases_group: str = _setting("fraudgate-cases", "consumer group of the case service", kind=NAME)
    cases_reviews_max: int = _setting(
        100_000,
        "most reviews without a verdict; beyond it the case service takes in none, and Kafka keeps them",
        least=1,
        most=10_000_000,
    )
    cases_lease_s: int = _setting(900, "how long an analyst holds a review unless told otherwise, seconds", least=10, most=86_400)
    cases_outbox_max: int = _setting(
        100_000,
        "most labels and audit records that wait for Kafka; beyond it verdicts and labels are refused",
        least=2,
        most=10_000_000,
    )
    cases_retention_days: int = _setting(
        400, "how long the case service keeps decided reviews and the labels that came through it, days", least=1, most=3650
    )
    webhooks_path: str = _setting("", "file of the webhooks that alert routes lead to (YAML or JSON); empty: there are none")
    webhook_timeout_ms: int = _setting(10_000, "longest time for a webhook to answer, milliseconds", least=10, most=60_000)
    webhook_concurrency: int = _setting(8, "most messages under way to one webhook", least=1, most=256)
    webhook_queue_max: int = _setting(
        10_000, "most messages waiting for one webhook; beyond it they are dead letters at once", least=1, most=1_000_000
    )
    webhook_attempts_max: int = _setting(12, "attempts to deliver a message until it is a dead letter", least=1, most=100)
    webhook_retry_first_ms: int = _setting(
        1000, "pause after the first failed attempt, milliseconds; it doubles with each, up to an hour", least=1, most=3_600_000
    )
    webhook_retry_max_s: int = _setting(
        86_400,
        "longest time from the first attempt to the last, and the oldest alert that is still sent, seconds",
        least=1,
        most=2_592_000,
    )
    webhook_dedup_s: int = _setting(
        3600, "how long the same alert to the same webhook is sent once, seconds", least=1, most=2_592_000
    )

    bronze_trigger_ms: int = _setting(2000, "trigger of the stream from Kafka to bronze, milliseconds", least=0, most=600_000)
    silver_trigger_ms: int = _setting(
        4000, "trigger of the stream from bronze to silver and Redis, milliseconds", least=0, most=600_000
    )
    gold_trigger_ms: int = _setting(20_000, "trigger of the stream from silver to gold, milliseconds", least=0, most=600_000)
    labels_trigger_ms: int = _setting(30_000, "trigger of the stream from labels to Redis, milliseconds", least=0, most=600_000)
    labels_retry_days: int = _setting(
        7, "how long a label whose payment is not there yet is kept to be tried again, days since Kafka took it", least=0, most=365
    )
    labels_payment_days: int = _setting(
        120, "how long before its label was reported a payment is looked for, days", least=1, most=3650
    )
    bronze_offsets_max: int = _setting(40_000, "most Kafka records in one batch of bronze", least=100, most=10_000_000)
    silver_batch_mb_max: int = _setting(8, "about how much of bronze one batch of silver reads, MiB of Parquet", least=1, most=4096)
    dedup_window_s: int = _setting(
        600,
        "how long the feature jobs remember a transaction_id, seconds; no less than the idempotency window",
        least=1,
        most=86_400,
    )
    redis_retry_s: int = _setting(
        30,
        "how long the feature jobs wait for a Redis that doesn't answer before the batch is tried anew, seconds",
        least=1,
        most=3600,
    )
    time_travel_days: int = _setting(
        30,
        "how long every version of the Delta tables can be read, and what was erased is still in old files, days",
        least=1,
        most=3650,
    )
    decisions_keep_days: int = _setting(
        400, "how long receipts are kept in the table decisions, days since Kafka took them; 0: for ever", least=0, most=36_500
    )
    bronze_keep_days: int = _setting(
        90, "how long raw records are kept in bronze and quarantine, likewise; 0: for ever", least=0, most=36_500
    )
    maintain_hours: int = _setting(6, "time between two rounds of fraudgate maintain, hours", least=1, most=8784)
    spark_cores: int = _setting(2, "threads of the local Spark driver", least=1, most=256)
    spark_optimise_calls: int = _setting(
        0,
        "calls after which the driver's JVM compiles a method with its optimising compiler; 0: never, the quick compiler only."
        " Thousands of transactions a second want 50000: tasks take half as much CPU, after half a minute of CPU for compiling",
        least=0,
        most=10_000_000,
    )
    spark_java_options: str = _setting(
        "", "more options of the driver's JVM, for instance a flight recording; they override the project's own"
    )
    burst_window_s: int = _setting(
        600, "sliding window in which declines of one merchant, device or card BIN make a burst, s", least=10, most=86_400
    )
    burst_declines_merchant: int = _setting(
        50,
        "declines at one merchant within that window that make a burst, of which one alert tells; 0: none do",
        least=0,
        most=1_000,
    )
    burst_declines_device: int = _setting(10, "the same of one device", least=0, most=1_000)
    burst_declines_bin: int = _setting(100, "the same of the cards of one BIN", least=0, most=1_000)
    burst_entities_max: int = _setting(
        100_000,
        "merchants, devices and BINs whose declines are remembered; of more the quietest are forgotten",
        least=100,
        most=10_000_000,
    )
    jobs_niceness: int = _setting(
        10, "how much the feature jobs that fraudgate up starts give way to others on a busy machine (nice)", least=0, most=19
    )
    broker_niceness: int = _setting(
        0, "the same of the Kafka broker, whose start takes all cores; no HTTP answer waits for it, Kafka's do", least=0, most=19
    )
    spark_memory_mb: int = _setting(1536, "heap of the local Spark driver, MiB", least=512, most=262_144)

    @property
    def home_path(self) -> Path:
        return Path(self.home).expanduser().absolute()

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser().absolute()

    @property
    def jars_path(self) -> Path:
        """Holds the folders kafka, spark and registry, as deploy.bootstrap fetched them."""
        return self.cache_path / "jars"

    @property
    def bootstrap(self) -> str:
        return self.kafka_bootstrap or f"{self.host}:{self.kafka_port}"

    @property
    def redis(self) -> str:
        return self.redis_url or f"redis://{self.host}:{self.redis_port}/0"

    @property
    def registry(self) -> str:
        return self.registry_url or f"http://{self.host}:{self.registry_port}/apis/ccompat/v7"

    @property
    def mlflow(self) -> str:
        return self.mlflow_url or f"http://{self.host}:{self.mlflow_port}"

    @property
    def gateway(self) -> str:
        return self.gateway_url or f"http://{self.host}:{self.gateway_port}"

    @property
    def proxy(self) -> str:
        return f"http://{self.host}:{self.proxy_port}"

    @property
    def cases(self) -> str:
        return f"http://{self.host}:{self.cases_port}"

    @property
    def console_jobs(self) -> str:
        return self.console_jobs_url.rstrip("/") or f"http://{self.host}:{self.jobs_port}"

    @property
    def console_cases(self) -> str:
        return self.console_cases_url.rstrip("/") or self.cases

    @property
    def prometheus(self) -> str:
        return self.prometheus_url or f"http://{self.host}:{self.prometheus_port}"

    @property
    def alertmanager(self) -> str:
        return self.alertmanager_url or f"http://{self.host}:{self.alertmanager_port}"

    @property
    def tables(self) -> str:
        return self.tables_uri or str(self.home_path / "tables")

    @property
    def checkpoints(self) -> str:
        return self.checkpoints_uri or str(self.home_path / "checkpoints")

    @property
    def models_path(self) -> Path:
        return Path(self.model_dir).expanduser().absolute() if self.model_dir else self.home_path / "models"

    @property
    def spool_root(self) -> Path:
        """Where each gateway process keeps its local log."""
        return Path(self.spool_dir).expanduser().absolute() if self.spool_dir else self.home_path / "spool"

    @property
    def lists_path(self) -> Path:
        """What the gateways keep of the lists, for a start without Kafka."""
        return self.home_path / "lists" / "book"

    @property
    def audit_cursor_path(self) -> Path:
        """How far the audit file of the models has been forwarded to the topic `audit`."""
        return self.home_path / "audit" / "cursor"

    @property
    def schemas_path(self) -> Path:
        """The local copy of the schema registry's answers."""
        return self.home_path / "schemas"


def client_headers(settings: Settings) -> dict[str, str]:
    """The HTTP header with the API key that our own callers send; nothing without a key. Raises `SettingError` for a bad file."""
    if not settings.client_key_path:
        return {}
    try:
        key = Path(settings.client_key_path).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingError(f"FRAUDGATE_CLIENT_KEY_PATH: the file can't be read: {type(exc).__name__}") from exc
    if not key or len(key) > CLIENT_KEY_LENGTH_MAX or not key.isprintable() or " " in key:
        raise SettingError("FRAUDGATE_CLIENT_KEY_PATH: the file must hold one API key")
    return {"Authorization": f"Bearer {key}"}


def settings_env(settings: Settings) -> dict[str, str]:
    """The FRAUDGATE_* variables that make `load_settings` of a process started anywhere return these settings."""
    env = {ENV_PREFIX + f.name.upper(): str(getattr(settings, f.name)) for f in fields(Settings)}
    return env | {ENV_PREFIX + "HOME": str(settings.home_path), ENV_PREFIX + "CACHE_DIR": str(settings.cache_path)}


def load_settings(env: Mapping[str, str] | None = None) -> Settings:
    """Settings from FRAUDGATE_* variables. Raises `SettingError`, also for a FRAUDGATE_ variable that names no setting."""
    env = os.environ if env is None else env
    known = {ENV_PREFIX + f.name.upper(): f for f in fields(Settings)}
    values: dict[str, Any] = {}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX):
            continue
        if name not in known:
            raise SettingError(f"{name} is not a setting; {_meant(name, known)}")
        f = known[name]
        values[f.name] = _number(name, text, f) if isinstance(f.default, int) else _text(name, text, f)
    settings = Settings(**values)
    if settings.feature_budget_ms >= settings.decision_budget_ms:
        raise SettingError("FRAUDGATE_FEATURE_BUDGET_MS must be less than FRAUDGATE_DECISION_BUDGET_MS")
    if settings.dedup_window_s < settings.idempotency_window_s:
        raise SettingError("FRAUDGATE_DEDUP_WINDOW_S must be at least FRAUDGATE_IDEMPOTENCY_WINDOW_S")
    return settings


def _meant(name: str, known: Iterable[str]) -> str:
    """What somebody may have meant who wrote `name`."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
    return f"is {near[0]} meant? docs/settings.md lists them" if near else "docs/settings.md lists them"


def _number(name: str, text: str, f: Field[Any]) -> int:
    least, most = f.metadata["least"], f.metadata["most"]
    # int() takes more than anybody means: 1_000, digits of any script, spaces around them.
    if DIGITS.fullmatch(text) is None or not least <= int(text) <= most:
        raise SettingError(f"{name} must be a whole number in {least}..{most}, not {text[:SHOWN_CHARS_MAX]!r}: {f.metadata['doc']}")
    return int(text)


def _text(name: str, text: str, f: Field[Any]) -> str:
    """The value isn't shown in a refusal: a URL may hold a password."""
    kind: Kind = f.metadata["kind"]
    if not text and f.default != "":
        raise SettingError(f"{name} must not be empty: {f.metadata['doc']}")
    if text and not kind.accepts(text):
        raise SettingError(f"{name} must be {kind.words}: {f.metadata['doc']}")
    return text
