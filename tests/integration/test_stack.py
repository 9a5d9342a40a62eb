"""The local stack on real processes. What stops or kills a service has a stack of its own, of Redis alone, to stay quick."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType
from mlflow import MlflowClient

from deploy import processes
from deploy.stack import Stack, StackError
from deploy.topics import QUARANTINE_BYTES_MAX, partitions
from gateway.contracts.registry import IncompatibleSchemaError, SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT, LIST_CHANGES, QUARANTINE, TOPICS, TRANSACTIONS
from tests.helpers import HOST, local_settings, run_command, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def lines() -> list[str]:
    """What the stack of `small` says."""
    return []


@pytest.fixture
def small(tmp_path: Path, lines: list[str]) -> Iterator[Stack]:
    """A stack that runs nothing yet; whatever a test starts in it is stopped."""
    stack = Stack(local_settings(tmp_path / "home"), say=lines.append)
    yield stack
    stack.stop()


def redis_of(stack: Stack) -> redis.Redis:
    return redis.Redis(host=HOST, port=stack.settings.redis_port)


def test_every_core_service_is_well(stack: Stack) -> None:
    entries = {entry.name: entry for entry in stack.status() if entry.name in stack.core_names}
    assert {name: e.health for name, e in entries.items()} == {"kafka": "ok", "redis": "ok", "registry": "ok", "mlflow": "ok"}
    assert all(e.memory_mb > 1 and e.pid == stack.pid(name) for name, e in entries.items())


def test_up_again_changes_nothing(stack: Stack) -> None:
    before = {name: stack.pid(name) for name in stack.core_names}
    done = run_command(stack.settings, "up")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already running") == len(before)
    assert {name: stack.pid(name) for name in stack.core_names} == before


def test_status_prints_a_table_and_json(stack: Stack) -> None:
    table = run_command(stack.settings, "status")
    assert table.returncode == 0, table.stdout + table.stderr
    assert ["redis", "running", str(stack.pid("redis"))] in [line.split()[:3] for line in table.stdout.splitlines()]
    printed = json.loads(run_command(stack.settings, "status", "--json").stdout)
    names = [entry["name"] for entry in printed]
    # The proxy and its second place are told of once they have run.
    assert names == [name for name in stack.services if name in names]
    assert {"kafka", "redis", "registry", "mlflow", "jobs", "gateway", "cases"} <= set(names)


def test_topics_have_the_partitions_of_the_setting(stack: Stack) -> None:
    of_one = {LIST_CHANGES: 1, AUDIT: 1}
    assert partitions(stack.settings) == dict.fromkeys(TOPICS, stack.settings.kafka_partitions) | of_one


def test_a_change_of_a_list_is_kept_for_ever(stack: Stack) -> None:
    admin = AdminClient({"bootstrap.servers": stack.settings.bootstrap})
    topics = [ConfigResource(ResourceType.TOPIC, name) for name in (LIST_CHANGES, AUDIT)]
    for future in admin.describe_configs(topics).values():
        config = future.result(30)
        assert [config[name].value for name in ("cleanup.policy", "retention.ms", "retention.bytes")] == ["delete", "-1", "-1"]


def test_quarantine_takes_a_message_larger_than_the_largest_transaction(stack: Stack) -> None:
    admin = AdminClient({"bootstrap.servers": stack.settings.bootstrap})
    topics = [ConfigResource(ResourceType.TOPIC, name) for name in (QUARANTINE, TRANSACTIONS)]
    limits = {r.name: int(f.result(30)["max.message.bytes"].value) for r, f in admin.describe_configs(topics).items()}
    assert limits[QUARANTINE] == QUARANTINE_BYTES_MAX
    assert limits[QUARANTINE] - limits[TRANSACTIONS] > 1_000_000


def test_a_topic_of_other_partitions_is_left_alone_and_told(stack: Stack) -> None:
    said: list[str] = []
    wanted = stack.settings.kafka_partitions + 1
    other = Stack(Settings(**{**vars(stack.settings), "kafka_partitions": wanted}), say=said.append)
    other.create_topics_and_schemas()
    told = [line for line in said if f"the setting says {wanted}" in line]
    assert len(told) == len([topic for topic in TOPICS.values() if topic.partitions is None])
    assert wanted not in partitions(stack.settings).values()


def test_a_schema_that_breaks_readers_is_refused(stack: Stack) -> None:
    registry = SchemaRegistry(stack.settings.registry)
    subject = TOPICS[TRANSACTIONS].subject
    schema = json.loads(TOPICS[TRANSACTIONS].schema_text)
    before = registry.ids_of_subject(subject)
    path = f"/subjects/{subject}/versions"
    required = {**schema, "fields": [*schema["fields"], {"name": "wallet", "type": "string"}]}
    with pytest.raises(IncompatibleSchemaError):
        registry.request("POST", path, {"schema": json.dumps(required)})
    retyped = {**schema, "fields": [{"name": "transaction_id", "type": "long"}, *schema["fields"][1:]]}
    with pytest.raises(IncompatibleSchemaError):
        registry.request("POST", path, {"schema": json.dumps(retyped)})
    assert registry.ids_of_subject(subject) == before


def test_compatibility_is_enforced_for_subjects_yet_to_come(stack: Stack) -> None:
    registry = SchemaRegistry(stack.settings.registry)
    path = "/subjects/test.unheard-of-value/versions"

    def record(fields: list[dict[str, str]]) -> dict[str, str]:
        return {"schema": json.dumps({"type": "record", "name": "R", "fields": fields})}

    registry.request("POST", path, record([]))
    with pytest.raises(IncompatibleSchemaError):
        registry.request("POST", path, record([{"name": "a", "type": "string"}]))


def test_a_taken_port_is_named_with_its_setting_and_its_owner(small: Stack) -> None:
    port = small.settings.redis_port
    with socket.create_server((HOST, port)):
        done = run_command(small.settings, "restart", "redis")
        assert done.returncode == 1
        assert f"port {port} is taken by process {os.getpid()}" in done.stderr
        assert "set FRAUDGATE_REDIS_PORT to a free port" in done.stderr
    assert small.pid("redis") is None


def test_one_failure_does_not_stop_the_others_from_starting(small: Stack) -> None:
    with (
        socket.create_server((HOST, small.settings.kafka_controller_port)),
        pytest.raises(StackError, match="KAFKA_CONTROLLER_PORT"),
    ):
        small.start(["kafka", "redis"])
    assert small.pid("redis") is not None


def test_a_service_that_dies_at_its_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    settings = local_settings(tmp_path, redis_url="", host="203.0.113.1")
    stack = Stack(settings)
    # An address that isn't this machine's can't be bound, so the ports' own check is left out to see Redis die of it.
    stack._check_ports = lambda service: None  # type: ignore[method-assign]
    with pytest.raises(StackError, match="(?s)redis died at its start.*redis.log.*(bind|Address)"):
        stack.start(["redis"])
    assert stack.stop() == []


def test_down_leaves_nothing_running(small: Stack) -> None:
    small.start(["redis"])
    record = small.record("redis")
    assert record is not None
    done = run_command(small.settings, "down")
    assert done.returncode == 0, done.stderr
    assert "redis       stopped" in done.stdout
    # It is this process's child and ends as a zombie until it is asked for.
    assert not processes.is_alive(record)
    assert processes.members(record) == []
    assert processes.listener_of(small.settings.redis_port) is None


def test_down_with_nothing_running_says_so(small: Stack) -> None:
    done = run_command(small.settings, "down")
    assert done.returncode == 0
    assert "nothing of" in done.stdout
    assert run_command(small.settings, "status").returncode == 1


def test_killed_redis_comes_back_with_every_acknowledged_write(small: Stack, lines: list[str]) -> None:
    small.start(["redis"])
    with redis_of(small) as client:
        for i in range(2000):
            assert client.set(f"key{i}", i)
        small.kill("redis")
        with pytest.raises(redis.ConnectionError):
            client.ping()
    assert {e.name: e.health for e in small.status()}["redis"] == "died"
    small.start(["redis"])
    with redis_of(small) as client:
        assert client.dbsize() == 2000
        assert client.get("key1999") == b"1999"
    assert sum("ready after" in line for line in lines) == 2


def test_up_after_a_kill_starts_just_the_one_that_died(small: Stack, lines: list[str]) -> None:
    small.start(["redis", "kafka"])
    kafka, dead = small.pid("kafka"), small.pid("redis")
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: small.pid("redis") is None, 5, "Redis is dead")
    lines.clear()
    small.start(["redis", "kafka"])
    assert small.pid("kafka") == kafka
    assert small.pid("redis") not in (None, dead)
    assert [line for line in lines if "starting" in line] == [f"redis       starting on port {small.settings.redis_port}"]


def test_redis_beyond_its_memory_refuses_writes_and_evicts_nothing(tmp_path: Path) -> None:
    stack = Stack(local_settings(tmp_path, redis_memory_mb=16))
    try:
        stack.start(["redis"])
        with redis_of(stack) as client:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                for i in range(20):
                    client.set(f"key{i}", b"x" * 2**20)
            assert client.get("key0") == b"x" * 2**20
    finally:
        stack.stop()


def test_a_pid_that_belongs_to_somebody_else_now_is_left_alone(small: Stack) -> None:
    small.start(["redis"])
    record = small.record("redis")
    assert record is not None
    path = small.settings.home_path / "run/redis.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "start_ticks": record.start_ticks - 1}))
    assert small.stop() == []
    assert processes.is_alive(record)
    path.write_text(text)
    assert small.stop() == ["redis"]


def test_a_service_that_is_somebody_elses_is_not_started_here(tmp_path: Path) -> None:
    stack = Stack(local_settings(tmp_path, redis_url="redis://elsewhere:6379/0", mlflow_url="http://elsewhere:5000"))
    assert stack.core_names == ["kafka", "registry"]
    with pytest.raises(StackError, match="there is no service 'redis' here"):
        stack.start(["redis"])


def test_two_commands_do_not_start_services_at_once(small: Stack) -> None:
    with small._lock():
        done = run_command(small.settings, "down")
    assert done.returncode == 1
    assert "another fraudgate command" in done.stderr


def test_mlflow_keeps_runs_artifacts_and_models(stack: Stack, tmp_path: Path) -> None:
    client = MlflowClient(stack.settings.mlflow)
    run = client.create_run(client.create_experiment("a test of the stack"))
    (tmp_path / "note.txt").write_text("kept by the server")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    (tmp_path / "fetched").mkdir()
    fetched = Path(client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path / "fetched")))
    assert fetched.read_text() == "kept by the server"
    stored = list((stack.settings.home_path / "data/mlflow/artifacts").rglob("note.txt"))
    assert len(stored) == 1
    client.create_registered_model("a-test-of-the-stack")
    version = client.create_model_version("a-test-of-the-stack", f"{run.info.artifact_uri}", run.info.run_id)
    client.set_registered_model_alias("a-test-of-the-stack", "champion", version.version)
    assert client.get_model_version_by_alias("a-test-of-the-stack", "champion").run_id == run.info.run_id
