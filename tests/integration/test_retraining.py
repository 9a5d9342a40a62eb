"""fraudgate retrain, from silver and labels through a real MLflow: a challenger when there is news, and never a champion."""

from __future__ import annotations

import dataclasses
import fcntl
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from mlflow import MlflowClient
from msgspec import structs

from deploy import retraining
from deploy.repeating import repeat
from deploy.retraining import LOCK_FILE, Plan, RetrainRunningError, attempt
from deploy.stack import Stack
from gateway.contracts import tables
from gateway.contracts.audit import read_audit
from gateway.contracts.settings import Settings, settings_env
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import DAY_MS
from model_export.registry import Registry
from tests.agreement.test_offline_engine_equals_a_recount import in_order, silver_of
from tests.entities import make_stream
from tests.helpers import run_command, running_command

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PAYMENTS_A_DAY = 60
LABELS = pa.schema([("transaction_id", pa.string()), ("is_fraud", pa.bool_()), ("reported_at_ms", pa.int64())])


@pytest.fixture
def local(stack: Stack, settings: Settings, tmp_path: Path) -> Settings:
    """The stack's MLflow with tables, a model directory and a home of the test's own."""
    assert stack.pid("mlflow") is not None
    return dataclasses.replace(
        settings, home=str(tmp_path / "home"), tables_uri=str(tmp_path / "tables"), mlflow_url=settings.mlflow
    )


def payments(days: int) -> list[Transaction]:
    """One every 24 minutes. Every eighth is large, and is the fraud; more days have the payments of fewer and go on."""
    rng = np.random.default_rng(5)
    stream = in_order(make_stream(7, days * PAYMENTS_A_DAY, 1000, 0))
    return [
        structs.replace(
            t,
            event_time_ms=stream[0].event_time_ms + i * (DAY_MS // PAYMENTS_A_DAY),
            amount_minor=int(rng.integers(90_000, 400_000) if i % 8 == 0 else rng.integers(100, 30_000)),
        )
        for i, t in enumerate(stream)
    ]


def write(settings: Settings, days: int) -> None:
    """Silver and labels of the first `days`: each fraud was reported a day later."""
    stream = payments(days)
    write_deltalake(tables.table_uri(settings.tables, tables.SILVER), silver_of(stream), mode="overwrite")
    rows = [
        {"transaction_id": t.transaction_id, "is_fraud": True, "reported_at_ms": t.event_time_ms + DAY_MS}
        for t in stream
        if t.amount_minor >= 90_000
    ]
    write_deltalake(tables.table_uri(settings.tables, tables.LABELS), pa.Table.from_pylist(rows, LABELS), mode="overwrite")


def aliases(settings: Settings, name: str) -> dict[str, str]:
    return dict(MlflowClient(settings.mlflow).get_registered_model(name).aliases)


def test_retraining_makes_a_challenger_when_labels_are_new_and_nothing_when_they_are_not(local: Settings) -> None:
    plan = Plan(name="again-and-again", labels_min=50)
    write(local, days=40)
    first = attempt(local, plan)
    assert (first.version, first.admitted) == ("1", True)
    # Never a champion, even where there is none.
    assert aliases(local, plan.name) == {"challenger": "1"}

    idle = attempt(local, plan)
    assert (idle.version, idle.said) == (None, "0 newly matured labels since the last training, 50 are needed: skipped")
    # Asked to train whatever is new, it sees that these are the same rows.
    same = attempt(local, dataclasses.replace(plan, labels_min=0))
    assert same.version is None
    assert "a model of exactly the" in same.said
    assert len(Registry(local.mlflow).versions(plan.name)) == 1

    write(local, days=50)
    second = attempt(local, plan)
    assert (second.version, second.admitted) == ("2", True)
    assert aliases(local, plan.name) == {"challenger": "2"}
    moves = [(e.action, e.subject, e.before, e.after) for e in read_audit(local.models_path)[0]]
    assert moves == [("retrain", "challenger", None, "1"), ("retrain", "challenger", "1", "2")]


def test_too_few_new_labels_wait_for_the_next_time(local: Settings) -> None:
    plan = Plan(name="patient", labels_min=50)
    write(local, days=40)
    attempt(local, plan)
    write(local, days=42)
    waiting = attempt(local, plan)
    assert waiting.version is None
    assert "15 newly matured labels since the last training" in waiting.said


def test_the_newest_days_alone_can_be_trained_on(local: Settings) -> None:
    write(local, days=60)
    attempt(local, Plan(name="recent", days=30))
    [version] = Registry(local.mlflow).versions("recent")
    assert version.training_rows == 30 * PAYMENTS_A_DAY


def test_two_retrainings_at_once_do_not_mix(local: Settings) -> None:
    write(local, days=40)
    local.home_path.mkdir()
    with (local.home_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RetrainRunningError, match="another fraudgate retrain"):
            attempt(local, Plan(name="alone"))


def test_the_command_trains_once_and_says_what_it_did(local: Settings) -> None:
    write(local, days=40)
    done = run_command(local, "retrain", "--name", "by-command", "--labels-min", "50", timeout_s=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "which is now challenger" in done.stdout
    again = run_command(local, "retrain", "--name", "by-command", timeout_s=120)
    assert (again.returncode, again.stderr) == (0, "")
    assert "0 newly matured labels" in again.stdout


def test_a_machine_without_a_scheduler_keeps_it_running_until_it_is_told_to_stop(local: Settings, tmp_path: Path) -> None:
    write(local, days=40)
    log = tmp_path / "retrain.log"
    # A tenth of a second: the second attempt has nothing to do and says so.
    every = ("--every-hours", str(0.1 / 3600))
    with running_command(local, "retrain", "--name", "kept-running", "--labels-min", "50", *every, log_path=log) as command:
        command.wait_until(lambda: "0 newly matured labels" in log.read_text(), 120, "the second attempt")
        assert command.stop(), "it didn't leave on SIGTERM"
    assert aliases(local, "kept-running") == {"challenger": "1"}


def test_the_command_says_in_one_line_what_is_missing(
    local: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in settings_env(local).items():
        monkeypatch.setenv(name, value)
    assert retraining.retrain(["--name", "nothing"]) == 1
    assert "silver holds no transactions" in capsys.readouterr().err


def test_attempts_follow_each_other_by_the_hours_given_until_it_is_told_to_stop() -> None:
    waited: list[float] = []
    times = iter([0.0, 20.0, 3600.0, 3700.0, 7200.0, 99_000.0])

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited.append(timeout)
            if len(waited) == 3:
                self.set()
            return self.is_set()

    stop = Stop()
    made: list[int] = []

    def once() -> int:
        made.append(1)
        return 1

    assert repeat(once, 3600, stop, lambda: next(times)) == 0
    # An attempt that took longer than the interval is followed at once, and one that failed by the next.
    assert (len(made), waited) == (3, [3580.0, 3500.0, 0.0])
