"""The supervisor of several workers when something doesn't come up, or the supervisor itself is killed. Needs no services."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest

from deploy.ports import free_ports
from gateway.contracts.settings import Settings
from tests.helpers import RunningCommand, run_command, running_command, wait_until
from tests.integration.gateway_helpers import make_transaction, name, post

pytestmark = pytest.mark.integration
WITHIN_S = 60
POLICY = Path(__file__).resolve().parents[2] / "gateway/default_policy"


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Settings:
    shutil.copytree(POLICY, tmp_path / "policy")
    return dataclasses.replace(
        settings,
        home=str(tmp_path / "home"),
        gateway_port=free_ports(1)[0],
        policy_path=str(tmp_path / "policy"),
        decision_budget_ms=9000,
    )


def workers(command: RunningCommand) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()]


def answers(settings: Settings) -> bool:
    with contextlib.suppress(OSError):
        return post(settings, make_transaction(name("t")))[0] == 200
    return False


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_workers_with_a_policy_that_can_not_be_meant_do_not_start(own: Settings) -> None:
    Path(own.policy_path, "policy.yaml").write_text("bands: 5\n")
    done = run_command(own, "serve", "--no-kafka", "--workers", "2")
    assert done.returncode == 2
    assert "policy" in done.stderr


@pytest.mark.slow
def test_a_new_worker_that_does_not_come_up_leaves_the_old_one_serving(own: Settings, tmp_path: Path) -> None:
    log_path = tmp_path / "gateway.log"
    with running_command(own, "serve", "--no-kafka", "--workers", "1", log_path=log_path) as command:
        command.wait_until(lambda: answers(own), WITHIN_S, "it serves")
        [old] = workers(command)
        file = Path(own.policy_path, "policy.yaml")
        good = file.read_text()
        file.write_text("bands: 5\n")
        assert run_command(own, "reload").returncode == 0
        command.wait_until(lambda: "the old one stays" in command.log(), WITHIN_S, "the new worker is given up")
        assert workers(command) == [old]
        assert answers(own)
        file.write_text(good)
        assert run_command(own, "reload").returncode == 0
        command.wait_until(lambda: "replaced 1 workers" in command.log(), WITHIN_S, "the worker is replaced")
        assert workers(command) != [old]
        assert answers(own)


@pytest.mark.slow
def test_workers_leave_when_their_supervisor_is_killed(own: Settings, tmp_path: Path) -> None:
    with running_command(own, "serve", "--no-kafka", "--workers", "2", log_path=tmp_path / "gateway.log") as command:
        command.wait_until(lambda: command.log().count("serves (pid") == 2, WITHIN_S, "both serve")
        left = workers(command)
        os.kill(command.pid, signal.SIGKILL)
        wait_until(lambda: all(gone(pid) for pid in left), WITHIN_S, "the workers have left")


@pytest.mark.slow
def test_there_is_nothing_to_replace_where_no_workers_run(own: Settings) -> None:
    done = run_command(own, "reload")
    assert done.returncode == 1
    assert "no gateway with workers runs here" in done.stderr
