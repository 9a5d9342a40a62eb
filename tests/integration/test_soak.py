"""The soak, as it is called: a short one on a stack of its own ends well, and one whose history was damaged does not.

Minutes each, nearly all of it the start of the stack and the streams that catch up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import processes
from deploy.processes import children_of, command_line
from gateway.contracts.settings import Settings
from tests.helpers import command_env, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]
WITHIN_S = 1400


def soak(settings: Settings, folder: Path, *arguments: str, planted: str = "") -> tuple[int, dict[str, Any], str]:
    """Exit status, report and output. `planted`: Python that runs before the command, in its process."""
    program = (
        f"import sys\n{planted}\nfrom deploy import cli\nsys.argv = ['fraudgate', 'soak', *sys.argv[1:]]\nsys.exit(cli.main())"
    )
    report, log = folder / "soak.json", folder / "soak.log"
    argv = [sys.executable, "-c", program, *arguments, "--report", str(report), "--home", str(folder)]
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=command_env(settings), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(WITHIN_S)
    finally:
        process.terminate()
        process.wait(300)
    text = log.read_text()
    print(text)
    assert not list(folder.glob("fraudgate-soak-*")), "it leaves nothing behind"
    return status, json.loads(report.read_text()) if report.exists() else {}, text


def test_two_minutes_with_a_killed_gateway_keep_every_promise_about_history(settings: Settings, tmp_path: Path) -> None:
    _, report, text = soak(
        settings, tmp_path, "--minutes", "2", "--seed", "1", "--rate", "200", "--warm-up", "20", "--faults", "gateway_kill"
    )
    assert report, text
    history, features = report["history"], report["features"]
    assert not any(history["counts"].values())
    assert history["accepted"] == pytest.approx(200 * 140, rel=0.02)
    assert history["decided"] == history["accepted"] + history["decided_without_an_answer"]
    assert not any(held["count"] for held in report["tables"].values())
    assert features["receipts"] > 0 and features["different"] == 0
    [happened] = report["happened"]
    assert (happened["kind"], happened["error"]) == ("gateway_kill", "")
    # How fast it was is not judged here: tests share the machine with others.
    assert report["whole"]["requests"] == 200 * 120 * 9 // 10
    assert report["whole"]["failed"] < 0.01 * report["whole"]["requests"]
    assert all((tmp_path / f"soak{suffix}").stat().st_size > 10_000 for suffix in (".png", ".svg"))


def test_a_receipt_that_disappears_or_comes_twice_fails_the_soak(settings: Settings, tmp_path: Path) -> None:
    planted = """
from deploy.soak import topics
take = topics.Receipts.take
def damaged(self, message):
    take(self, message)
    if self.receipts[77] == 1 and self.receipts[78] == 1:
        self.receipts[77], self.receipts[78] = 0, 2
topics.Receipts.take = damaged
from deploy.soak import run
run.RECORDED_WITHIN_S = 5
"""
    arguments = ["--minutes", "0.5", "--seed", "2", "--rate", "100", "--warm-up", "5", "--faults", "poison"]
    status, report, text = soak(settings, tmp_path, *arguments, planted=planted)
    assert status == 1
    counts = {name: n for name, n in report["history"]["counts"].items() if n}
    assert counts == {"lost": 1, "duplicated": 1}
    assert "decided more than once: 1 (78)" in text
    assert report["poison"]["messages"] > 100
    assert {status[0] for status in report["poison"]["bodies"]} == {"4"}


def test_ctrl_c_ends_everything_that_was_started(settings: Settings, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "deploy.cli", "soak", "--minutes", "5", "--seed", "3", "--rate", "50", "--home", str(tmp_path)]
    log = tmp_path / "soak.log"
    record = processes.spawn([*argv, "--report", str(tmp_path / "soak.json")], command_env(settings), Path.cwd(), log)
    try:
        wait_until(lambda: "answered a second" in log.read_text(), 600, "the load runs")
        started = [pid for pid in descendants(record.pid) if pid != record.pid]
        assert any("gateway.worker" in command_line(pid) for pid in descendants_of_stack(tmp_path))
        os.kill(record.pid, signal.SIGINT)
        wait_until(lambda: not processes.is_alive(record), 300, f"it ends\n{processes.log_tail(log)}")
    finally:
        processes.stop(record, 300)
    assert started
    assert not descendants_of_stack(tmp_path)
    assert not list(tmp_path.glob("fraudgate-soak-*"))


def descendants(pid: int) -> list[int]:
    children, found = children_of(), [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def descendants_of_stack(folder: Path) -> list[int]:
    """Living processes that were started with a home below `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"FRAUDGATE_HOME={folder}/".encode() in environment:
            found.append(int(entry.name))
    return found
