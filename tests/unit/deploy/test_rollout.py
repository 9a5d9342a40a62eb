"""The parts of `fraudgate deploy` that need no process: what a version is, what the proxy is told, when a version goes back."""

from __future__ import annotations

import dataclasses
import math
import resource
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.rollout import proxy, watch
from deploy.rollout.proxy import MAINT, READY, Proxy, ServerStat, configuration, server_stat
from deploy.rollout.state import (
    BLUE,
    GREEN,
    RolloutError,
    State,
    Version,
    changed_settings,
    commit_of,
    own_version,
    read_state,
    slot_command,
    write_state,
)
from deploy.toolchain import find_haproxy
from gateway.contracts.settings import Settings, load_settings
from gateway.http.door import SCORE_PATH
from tests.tools import needs_haproxy

UP = ServerStat(status="UP", sessions=0, requests=1000, failed=0, repeated=0)
BOUNDS = watch.Bounds(failed_share_max=0.01, p99_s_max=0.1)


def version(**changes: str) -> Version:
    given = tuple(name for name in changes if name != "FRAUDGATE_HOME")
    return Version(directory="/srv/v2", python="/srv/v2/.venv/bin/python", settings=changes, given=given, commit="abc")


def test_what_is_deployed_is_read_back(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    state = State(active=GREEN, versions={BLUE: version(), GREEN: version(FRAUDGATE_KEEP_ALIVE_S="60")}, trial=version())
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    # It may hold the password of a URL.
    assert (tmp_path / "rollout/state.json").stat().st_mode & 0o077 == 0
    (tmp_path / "rollout/state.json").write_text("{")
    with pytest.raises(RolloutError, match=r"state\.json can't be read"):
        read_state(tmp_path)


def test_before_the_first_deploy_the_gateway_is_what_it_always_was() -> None:
    settings = Settings(home="/h")
    argv, env = slot_command(settings, BLUE, None)
    assert argv[1:] == ["-m", "deploy.cli", "serve"]
    assert load_settings({name: value for name, value in env.items() if name.startswith("FRAUDGATE_")}).gateway_port == 18080


def test_only_the_place_that_has_the_traffic_consumes_from_its_start() -> None:
    settings = Settings(home="/h", gateway_green_port=7, instance_id="5")
    state = State(active=BLUE, versions={BLUE: version(), GREEN: version(FRAUDGATE_KEEP_ALIVE_S="60", FRAUDGATE_INSTANCE_ID="9")})
    argv, env = slot_command(settings, GREEN, state)
    assert argv == ["/srv/v2/.venv/bin/python", "-P", "-m", "deploy.cli", "serve", "--standby"]
    assert env == {
        "FRAUDGATE_HOME": "/h",
        "FRAUDGATE_HOST": "127.0.0.1",
        "FRAUDGATE_GATEWAY_PORT": "7",
        "FRAUDGATE_INSTANCE_ID": "5",
        "FRAUDGATE_CONSUMER_GROUP": "fraudgate-gateway",
        "FRAUDGATE_KEEP_ALIVE_S": "60",
        "PYTHONPATH": "/srv/v2",
    }
    assert "--standby" not in slot_command(settings, BLUE, state)[0]
    # What is tried takes the place of what ran there before, and of nothing else.
    tried = State(active=BLUE, versions=state.versions, trial=version(FRAUDGATE_KEEP_ALIVE_S="61"))
    assert slot_command(settings, GREEN, tried)[1]["FRAUDGATE_KEEP_ALIVE_S"] == "61"
    assert slot_command(settings, BLUE, tried) == slot_command(settings, BLUE, state)


def test_another_version_is_told_only_what_differs_from_the_defaults() -> None:
    assert changed_settings(Settings()) == {}
    assert changed_settings(Settings(keep_alive_s=60, gateway_url="http://a:1")) == {"FRAUDGATE_KEEP_ALIVE_S": "60"}
    assert own_version(Settings(keep_alive_s=60)).settings == {"FRAUDGATE_KEEP_ALIVE_S": "60"}


def test_a_password_in_a_url_stands_in_no_audit_entry() -> None:
    told = version(FRAUDGATE_REDIS_URL="redis://:secret@a", FRAUDGATE_KEEP_ALIVE_S="60", FRAUDGATE_HOME="/h").told()
    assert told == "abc /srv/v2 FRAUDGATE_KEEP_ALIVE_S=60 FRAUDGATE_REDIS_URL=..."


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        (tmp_path / "file").write_text("a")
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    commit = commit_of(tmp_path)
    assert len(commit) == 12
    (tmp_path / "file").write_text("b")
    assert commit_of(tmp_path) == commit + "+"


def test_the_proxy_begins_with_the_place_that_has_the_traffic() -> None:
    settings = Settings(home="/h", gateway_port=1, gateway_green_port=2, proxy_port=3)
    first = configuration(settings, None)
    assert "server blue 127.0.0.1:1 check\n" in first
    assert "server green 127.0.0.1:2 check disabled\n" in first
    second = configuration(settings, State(active=GREEN, versions={}))
    assert "server blue 127.0.0.1:1 check disabled\n" in second
    assert "server green 127.0.0.1:2 check\n" in second
    assert "bind 127.0.0.1:3\n" in first


def test_the_proxy_takes_no_more_connections_than_it_may_have_files_for() -> None:
    settings = Settings(connections_max=10_000)
    assert [proxy.connections_max(settings, files) for files in (100_000, 20_000, 1024, 100, resource.RLIM_INFINITY)] == [
        *(10_000, 9872, 384, 1, 10_000)
    ]


def test_only_what_may_come_twice_is_repeated() -> None:
    assert proxy.SCORE_PATH == SCORE_PATH
    assert "http-request disable-l7-retry unless { path /score } || { method GET }\n" in configuration(Settings(), None)


def test_the_console_stays_this_machine_s_where_nobody_has_a_key() -> None:
    guard = "http-request deny if { path_beg /console } !{ src 127.0.0.0/8 ::1 }\n"
    assert guard in configuration(Settings(), None)
    assert guard not in configuration(Settings(api_keys_path="keys"), None)
    assert guard not in configuration(Settings(console_access="open"), None)


@needs_haproxy
def test_haproxy_accepts_its_configuration(tmp_path: Path) -> None:
    program = find_haproxy()
    (tmp_path / "run").mkdir()
    path = tmp_path / "haproxy.cfg"
    path.write_text(configuration(Settings(home=str(tmp_path)), None))
    done = subprocess.run([program, "-c", "-f", path], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    # It warns of what it ignores.
    assert "WARNING" not in done.stderr


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[tuple[Proxy, list[str], dict[str, str]]]:
    """A proxy's admin socket: what it was told, and what it answers (nothing, unless put into the dictionary)."""
    told: list[str] = []
    answers: dict[str, str] = {}
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    command = connection.recv(4096).decode().strip()
                    if command == "end":
                        return
                    told.append(command)
                    connection.sendall(answers.get(command, "\n").encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield Proxy(path), told, answers
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:
            last.connect(str(path))
            last.sendall(b"end")
        thread.join()


def test_a_server_that_is_made_ready_is_checked_first(admin: tuple[Proxy, list[str], dict[str, str]]) -> None:
    running, told, _ = admin
    running.set_weight(GREEN, 10)
    running.set_state(GREEN, READY)
    running.set_state(BLUE, MAINT)
    assert told == [
        "set server gateways/green weight 10%",
        "enable health gateways/green",
        "set server gateways/green state ready",
        "set server gateways/blue state maint",
    ]


def test_what_the_proxy_refuses_is_told(admin: tuple[Proxy, list[str], dict[str, str]]) -> None:
    running, _, answers = admin
    answers["set server gateways/green weight 500%"] = "Absolute weight can only be between 0 and 256 inclusive.\n"
    with pytest.raises(RolloutError, match="Absolute weight"):
        running.set_weight(GREEN, 500)


def test_the_proxy_s_table_is_read_by_its_columns(admin: tuple[Proxy, list[str], dict[str, str]]) -> None:
    running, _, answers = admin
    answers["show stat"] = (
        "# pxname,svname,status,scur,stot,hrsp_5xx,econ,eresp,wretr,wredis,\n"
        "payments,FRONTEND,OPEN,3,70,5,,,,,\n"
        "gateways,blue,UP 1/3,2,60,1,2,3,4,5,\n"
        "gateways,green,MAINT,0,,,,,,,\n"
        "gateways,BACKEND,UP,2,60,6,0,0,4,5,\n"
    )
    found = running.stats()
    assert found == {BLUE: ServerStat("UP 1/3", 2, 60, 6, 4), GREEN: ServerStat("MAINT", 0, 0, 0, 0)}
    assert (found[BLUE].up, found[GREEN].up) == (True, False)


def test_a_proxy_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = Proxy(tmp_path / "none")
    assert not gone.answers
    with pytest.raises(RolloutError, match="doesn't answer"):
        gone.stats()


PAGE = """\
# TYPE fraudgate_decision_latency_{unit} histogram
fraudgate_decision_latency_{unit}_bucket{{door="http",le="{a}"}} {0}
fraudgate_decision_latency_{unit}_bucket{{door="kafka",le="{a}"}} 7000.0
fraudgate_decision_latency_{unit}_bucket{{le="{b}",door="http"}} {1}
fraudgate_decision_latency_{unit}_bucket{{door="http",le="+Inf"}} {2}
fraudgate_decision_latency_{unit}_count{{door="http"}} {2}
"""


@pytest.mark.parametrize(("unit", "a", "b"), [("ms", "5.0", "50.0"), ("seconds", "0.005", "0.05")])
def test_latencies_are_seconds_whatever_the_version_s_unit(unit: str, a: str, b: str) -> None:
    before = watch.histogram(PAGE.format(100.0, 100.0, 100.0, unit=unit, a=a, b=b))
    now = watch.histogram(PAGE.format(1080.0, 1095.0, 1100.0, unit=unit, a=a, b=b))
    answers = watch.since(before, now)
    assert answers == {0.005: 980.0, 0.05: 995.0, math.inf: 1000.0}
    assert watch.p99_s(answers) == 0.05
    assert watch.p99_s(watch.since({}, watch.histogram(PAGE.format(0.0, 0.0, 199.0, unit=unit, a=a, b=b)))) is None


def test_a_new_version_may_be_as_slow_as_promised_or_twice_as_slow_as_the_old() -> None:
    assert [watch.p99_bound_s(old) for old in (None, 0.01, 0.3, math.inf)] == [0.1, 0.1, 0.6, 0.1]


def quick(count: float) -> watch.Histogram:
    return {0.01: count, math.inf: count}


def test_a_version_that_does_well_stays() -> None:
    now = dataclasses.replace(UP, requests=2000, failed=5, repeated=5)
    assert watch.complaint(UP, now, quick(1000.0), BOUNDS) is None


@pytest.mark.parametrize(
    ("now", "answers", "said"),
    [
        (dataclasses.replace(UP, status="DOWN"), quick(1000.0), "the proxy finds it DOWN"),
        (dataclasses.replace(UP, requests=2000, failed=11), quick(1000.0), "11 of 1000 requests failed, more than 1.00%"),
        (dataclasses.replace(UP, requests=2000, repeated=11), quick(1000.0), "11 of 1000 requests failed"),
        (dataclasses.replace(UP, requests=1005, failed=5), quick(0.0), "5 of 5 requests failed"),
        (UP, {0.1: 989.0, 0.2: 1000.0, math.inf: 1000.0}, "its p99 is 200 ms, more than 100 ms"),
        (UP, {0.1: 0.0, math.inf: 1000.0}, "its p99 is inf ms"),
    ],
)
def test_a_version_that_does_badly_is_told_why(now: ServerStat, answers: watch.Histogram, said: str) -> None:
    why = watch.complaint(UP, now, answers, BOUNDS)
    assert why is not None
    assert said in why


def test_four_failures_of_the_first_four_requests_are_no_ratio_yet() -> None:
    assert watch.complaint(UP, dataclasses.replace(UP, requests=1004, failed=4), {}, BOUNDS) is None


def test_an_empty_field_of_the_proxy_counts_as_nothing() -> None:
    assert server_stat({"status": "no check", "scur": "", "stot": ""}) == ServerStat("no check", 0, 0, 0, 0)
