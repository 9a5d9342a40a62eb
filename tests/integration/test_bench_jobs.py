"""`fraudgate bench jobs` from start to end, small: it reports, and leaves nothing running or lying about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.processes import children_of, command_line
from tests.helpers import local_settings, run_command

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(420)]


def test_a_small_run_reports_every_part_and_leaves_nothing_running(tmp_path: Path) -> None:
    home, report = tmp_path / "home", tmp_path / "report.json"
    arguments = ("--events", "2000", "--warm-up", "1000", "--cards", "200", "--home", str(home), "--json", str(report))
    done = run_command(local_settings(tmp_path / "other"), "bench", "jobs", *arguments, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert result["events"] == 2000
    assert all(us > 0 for us in result["cpu_us"].values())
    assert result["state_rows"] > 0
    running = [command_line(pid) for pids in children_of().values() for pid in pids]
    assert [line for line in running if str(home) in line] == []
