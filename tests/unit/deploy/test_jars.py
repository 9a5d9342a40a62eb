"""The lock of the JVM programs and what is made of it. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy import jars, truststore
from deploy.jars import JarsError, LockedFile
from deploy.ports import free_ports
from deploy.services import REGISTRY_ARCHIVE
from deploy.toolchain import java_home
from gateway.contracts.settings import Settings
from tests.helpers import local_settings

CONTENT = b"content of a jar"
LOCKED = [LockedFile(f"{name}.jar", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()) for name in ("kafka/a", "spark/b")]


def write_all(folder: Path, content: bytes = CONTENT, configurations: Sequence[str] = ("kafka", "spark")) -> None:
    for file in (file for file in LOCKED if file.configuration in configurations):
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_the_lock_names_what_the_stack_starts() -> None:
    paths = [file.path for file in jars.read_lock()]
    assert f"registry/{REGISTRY_ARCHIVE}" in paths
    assert any(path.startswith("kafka/kafka_2.13-") for path in paths)
    assert any(path.startswith("spark/delta-spark_") for path in paths)
    assert paths == sorted(set(paths))


def test_a_file_of_another_size_counts_as_missing(tmp_path: Path) -> None:
    assert jars.missing(tmp_path, LOCKED) == LOCKED
    write_all(tmp_path)
    assert jars.missing(tmp_path, LOCKED) == []
    (tmp_path / LOCKED[1].path).write_bytes(CONTENT[:-1])
    assert jars.missing(tmp_path, LOCKED) == LOCKED[1:]


def test_a_file_of_another_content_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert jars.differing(tmp_path, LOCKED) == []
    (tmp_path / LOCKED[0].path).write_bytes(CONTENT[::-1])
    assert jars.differing(tmp_path, LOCKED) == LOCKED[:1]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(jars, "read_lock", lambda: LOCKED)
    return local_settings(tmp_path / "home", cache_dir=str(tmp_path / "cache"))


def retrieve_of(content: bytes) -> object:
    def retrieve(settings: Settings, into: Path, expected_bytes: int, configurations: Sequence[str]) -> None:
        (settings.cache_path / "ivy").mkdir(exist_ok=True)
        assert expected_bytes == len(configurations) * len(CONTENT)
        write_all(into, content, configurations)

    return retrieve


def test_a_damaged_set_of_jars_is_repaired_as_a_whole(cached: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jars, "_retrieve", retrieve_of(CONTENT))
    stale = cached.jars_path / "kafka/old.jar"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"from an earlier version")
    jars.fetch(cached)
    assert jars.differing(cached.jars_path, LOCKED) == []
    assert not stale.exists()
    assert sorted(path.name for path in cached.cache_path.iterdir()) == ["jars", "lock"]


def test_only_the_configuration_that_lacks_something_is_fetched_anew(cached: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(cached.jars_path)
    (cached.jars_path / "spark/b.jar").unlink()
    kept = (cached.jars_path / "kafka/a.jar").stat().st_ino
    monkeypatch.setattr(jars, "_retrieve", retrieve_of(CONTENT))
    jars.fetch(cached)
    assert jars.differing(cached.jars_path, LOCKED) == []
    assert (cached.jars_path / "kafka/a.jar").stat().st_ino == kept


def test_what_is_for_s3_is_fetched_only_when_asked_for() -> None:
    assert {file.configuration for file in jars.of(jars.CONFIGURATIONS)} - {file.configuration for file in jars.of(jars.USUAL)} == {
        "spark-s3a"
    }


def test_nothing_is_fetched_when_all_is_there(cached: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(cached.jars_path)
    monkeypatch.delattr(jars, "_retrieve")
    assert jars.fetch(cached) == 0.0


def test_a_download_that_differs_from_the_lock_is_not_installed(cached: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jars, "_retrieve", retrieve_of(CONTENT[::-1]))
    with pytest.raises(JarsError, match="2 of 2 files are not what"):
        jars.fetch(cached)
    assert not cached.jars_path.exists()


def test_ivy_knows_every_configuration_that_it_is_asked_for(cached: Settings, tmp_path: Path) -> None:
    # Nothing listens there: Ivy gets as far as asking for the modules of all of them.
    nowhere = local_settings(tmp_path / "home", cache_dir=cached.cache_dir, maven_url=f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(JarsError, match="org.apache.kafka#kafka_2.13"):
        jars.fetch(nowhere)
    log = (nowhere.cache_path / "ivy.log").read_text()
    assert "configuration not found" not in log
    assert "io.delta#delta-spark" in log


def test_java_reads_the_key_store_that_python_writes(tmp_path: Path, settings: Settings) -> None:
    certificates = truststore.system_certificates()[:3]
    if not certificates:
        pytest.skip("this system names no certificate authorities")
    store = tmp_path / "store"
    store.write_bytes(truststore.key_store(certificates))
    keytool = java_home(settings.cache_path) / "bin/keytool"
    argv = [str(keytool), "-list", "-keystore", str(store), "-storepass", truststore.PASSWORD]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert f"contains {len(certificates)} entries" in done.stdout, done.stdout + done.stderr


def test_a_mirror_is_named_to_ivy_and_maven_central_is_left_to_it() -> None:
    assert "root=" not in jars.ivy_settings("")
    assert 'root="https://mirror.example/maven?a&amp;b/"' in jars.ivy_settings("https://mirror.example/maven?a&b")
