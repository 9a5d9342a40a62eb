"""Finding Java and Redis, with stand-ins that print a version."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deploy import toolchain
from deploy.bootstrap import no_service_started
from deploy.toolchain import ToolMissingError


def make_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_java(home: Path, version: str) -> Path:
    (home / "lib").mkdir(parents=True)
    return make_program(home / "bin/java", f"echo 'openjdk version \"{version}\" 2025-04-15' >&2")


@pytest.mark.parametrize(("version", "major"), [("17.0.15", 17), ("21", 21), ("1.8.0_392", 8), ("25-ea", 25)])
def test_java_versions_are_read(tmp_path: Path, version: str, major: int) -> None:
    assert toolchain.java_major(make_java(tmp_path, version)) == major


def test_a_java_that_does_not_run_has_version_0(tmp_path: Path) -> None:
    assert toolchain.java_major(tmp_path / "java") == 0
    assert toolchain.java_major(make_program(tmp_path / "shim", "echo 'java: command not found' >&2; exit 127")) == 0


def test_java_home_comes_before_path(tmp_path: Path) -> None:
    make_java(tmp_path / "a", "17.0.1")
    make_java(tmp_path / "b", "21.0.1")
    env = {"JAVA_HOME": str(tmp_path / "a"), "PATH": str(tmp_path / "b/bin")}
    assert toolchain.system_java_home(env) == tmp_path / "a"


def test_a_java_home_that_is_too_old_gives_way_to_path(tmp_path: Path) -> None:
    make_java(tmp_path / "a", "11.0.1")
    make_java(tmp_path / "b", "21.0.1")
    env = {"JAVA_HOME": str(tmp_path / "a"), "PATH": str(tmp_path / "b/bin")}
    assert toolchain.system_java_home(env) == tmp_path / "b"
    assert toolchain.system_java_home(env | {"PATH": str(tmp_path / "a/bin")}) is None


def test_java_on_path_is_followed_through_links(tmp_path: Path) -> None:
    java = make_java(tmp_path / "real", "17.0.1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/java").symlink_to(java)
    assert toolchain.system_java_home({"PATH": str(tmp_path / "bin")}) == tmp_path / "real"


def test_redis_older_than_6_2_is_not_taken(tmp_path: Path) -> None:
    make_program(tmp_path / "redis-server", "echo 'Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc bits=64'")
    assert toolchain.system_redis({"PATH": str(tmp_path)}) is None
    valkey = make_program(tmp_path / "valkey-server", "echo 'Valkey server v=8.1.8 sha=00000000:0 malloc=libc bits=64'")
    assert toolchain.system_redis({"PATH": str(tmp_path)}) == valkey


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "wheel_folder", lambda _package, _folder: None)
    env = {"PATH": str(tmp_path)}
    with pytest.raises(ToolMissingError, match="make setup.*openjdk-17"):
        toolchain.java_home(tmp_path, env)
    with pytest.raises(ToolMissingError, match="make setup.*redis-server"):
        toolchain.find_redis(env)


def test_the_launcher_of_the_wheel_drops_the_missing_module_only(tmp_path: Path) -> None:
    runtime = tmp_path / "run time"
    (runtime / "lib").mkdir(parents=True)
    make_program(runtime / "bin/java", 'printf "[%s]" "$@"')
    make_program(runtime / "bin/keytool", "echo keytool")
    home = toolchain.wheel_java_home(runtime, tmp_path / "cache")
    argv = [str(home / "bin/java"), "-cp", "a b/*", toolchain.MISSING_MODULE_OPTION, "--add-modules=java.sql", "Main", "$x", ""]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "[-cp][a b/*][--add-modules=java.sql][Main][$x][]"
    assert (home / "lib").is_dir()
    assert (home / "bin/keytool").exists()


def test_the_home_of_the_wheel_follows_a_runtime_that_moved(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_program(tmp_path / name / "bin/java", f"echo {name}")
        home = toolchain.wheel_java_home(tmp_path / name, tmp_path / "cache")
        assert subprocess.run([home / "bin/java"], capture_output=True, text=True, check=True).stdout == f"{name}\n"
    assert list((tmp_path / "cache").iterdir()) == [home]


@pytest.mark.parametrize(
    ("find", "program", "package"),
    [
        (toolchain.find_prometheus, "prometheus", "prometheus"),
        (toolchain.find_promtool, "promtool", "prometheus"),
        (toolchain.find_alertmanager, "alertmanager", "prometheus-alertmanager"),
        (toolchain.find_chromium, "chromium-browser", "chromium"),
        (toolchain.find_chromedriver, "chromedriver", "chromium-driver"),
    ],
)
def test_what_only_debian_has_is_found_on_path_or_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find: Callable[[Mapping[str, str]], Path], program: str, package: str
) -> None:
    monkeypatch.setattr(toolchain, "SYSTEM_PATH", str(tmp_path / "sbin"))
    with pytest.raises(ToolMissingError, match=f"install {package}$"):
        find({"PATH": str(tmp_path / "bin")})
    made = make_program(tmp_path / "sbin" / program, "true")
    assert find({"PATH": str(tmp_path / "bin")}) == made
    preferred = make_program(tmp_path / "bin" / program, "true")
    assert find({"PATH": str(tmp_path / "bin")}) == preferred


def test_apt_starts_nothing_while_it_installs_and_somebody_elses_policy_stays(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    with no_service_started(policy):
        # 101 is "action forbidden by policy" to invoke-rc.d.
        assert subprocess.run([policy, "redis-server", "start"], check=False).returncode == 101
    assert not policy.exists()
    policy.write_text("theirs")
    with no_service_started(policy):
        assert policy.read_text() == "theirs"
    assert policy.read_text() == "theirs"
