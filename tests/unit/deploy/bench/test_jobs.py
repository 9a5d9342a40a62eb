"""What the benchmark of the Spark streams counts, without starting anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

from deploy.bench.jobs import Rows, bench, threads_s
from deploy.ports import free_ports
from deploy.processes import children_of
from feature_jobs.session import compiler_options
from gateway.contracts import tables
from gateway.contracts.settings import Settings


def commit(log: Path, number: int, *rows: int) -> None:
    adds = [{"add": {"stats": json.dumps({"numRecords": n})}} for n in rows]
    (log / f"{number:020d}.json").write_text("\n".join(json.dumps(line) for line in [{"commitInfo": {}}, *adds]))


def test_rows_of_a_table_are_counted_as_its_commits_appear(tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    rows = Rows(settings, tables.SILVER)
    assert rows.look() == 0
    log = Path(tables.table_uri(settings.tables, tables.SILVER)) / "_delta_log"
    log.mkdir(parents=True)
    commit(log, 0)
    commit(log, 1, 10, 5)
    assert (rows.look(), rows.commits) == (15, 1)
    commit(log, 2, 7)
    assert (rows.look(), rows.commits) == (22, 2)


def test_ports_are_different() -> None:
    assert len(set(free_ports(7))) == 7


def test_this_process_is_a_child_of_its_parent_and_its_threads_are_counted() -> None:
    assert os.getpid() in children_of()[os.getppid()]
    assert sum(threads_s(os.getpid()).values()) > 0


def test_a_call_that_cannot_be_measured_is_refused(tmp_path: Path, capsys: object) -> None:
    (tmp_path / "something").touch()
    for wrong in (["jobs", "--events", "1"], ["jobs", "--core", "4096"], ["jobs", "--home", str(tmp_path)], ["nothing"]):
        try:
            bench(wrong)
        except SystemExit as exc:
            assert exc.code == 2
        else:
            raise AssertionError(wrong)


def test_the_optimising_compiler_is_off_at_0_and_else_in_the_proportions_of_the_jvm() -> None:
    assert compiler_options(0) == "-XX:TieredStopAtLevel=1"
    chosen = dict(part.removeprefix("-XX:").split("=") for part in compiler_options(5000).split())
    # As `java -XX:+PrintFlagsFinal` prints them: 5000, 600, 15000, 40000.
    assert int(chosen["Tier4InvocationThreshold"]) == 5000
    assert 500 < int(chosen["Tier4MinInvocationThreshold"]) < 700
    assert int(chosen["Tier4CompileThreshold"]) == 15_000
    assert int(chosen["Tier4BackEdgeThreshold"]) == 40_000
