"""How `fraudgate pull` behaves where nobody watches it: before a gateway starts, and beside it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gateway.contracts.model_meta import MODEL_FILE
from model_export import registry_commands
from model_export.errors import RegistryUnavailableError
from model_export.pull_loop import RETRY_S, Patience, keep_pulling, pull_patiently, whole
from tests.factories_model import make_model_dir


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses = 0

    def read(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        self.pauses += 1


class Source:
    """Fails so many times, then succeeds."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise RegistryUnavailableError("MLflow doesn't answer")


def tried(models: Path, source: Source, patience: Patience) -> tuple[bool, Clock, list[str]]:
    clock, said = Clock(), list[str]()
    return pull_patiently(source, models, patience, said.append, clock.read, clock.pause), clock, said


def test_a_registry_that_comes_up_late_is_waited_for(tmp_path: Path) -> None:
    source = Source(3)
    done, clock, _ = tried(tmp_path, source, Patience(wait_s=60))
    assert done
    assert (source.calls, clock.now_s) == (4, 3 * RETRY_S)


def test_without_a_model_the_start_fails_when_patience_ends(tmp_path: Path) -> None:
    source = Source(1000)
    with pytest.raises(RegistryUnavailableError):
        tried(tmp_path, source, Patience(wait_s=20, keep=True))
    assert source.calls == 1 + 20 / RETRY_S


def test_whole_models_of_before_are_kept_at_once(tmp_path: Path) -> None:
    make_model_dir(tmp_path, rows=1000, trees=5)
    done, clock, said = tried(tmp_path, Source(1000), Patience(wait_s=600, keep=True))
    assert (done, clock.pauses) == (False, 0)
    assert said[-1] == "the models that are there stay"


def test_damaged_models_of_before_are_not_kept(tmp_path: Path) -> None:
    made = make_model_dir(tmp_path, rows=1000, trees=5)
    assert whole(tmp_path)
    path = tmp_path / made.routes["champion"].directory / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert not whole(tmp_path)
    with pytest.raises(RegistryUnavailableError):
        tried(tmp_path, Source(1000), Patience(wait_s=1, keep=True))


def test_who_may_go_without_goes_without_when_patience_ends(tmp_path: Path) -> None:
    done, clock, said = tried(tmp_path, Source(1000), Patience(wait_s=20, without=True))
    assert (done, clock.now_s) == (False, 20)
    assert said[-1] == "going on without a model"


def test_an_outage_is_told_once_and_pulling_goes_on() -> None:
    stop, said = threading.Event(), list[str]()
    source = Source(2)

    def once() -> None:
        if source.calls == 4:
            stop.set()
        source()

    keep_pulling(once, 0.0, stop, said.append)
    assert source.calls == 5
    assert said == ["MLflow doesn't answer"]


@pytest.mark.parametrize("argv", [["--every-s", "0"], ["--every-s", "86401"], ["--wait-s", "-1"]])
def test_an_interval_out_of_bounds_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        registry_commands.pull(argv)
    assert exited.value.code == 2
