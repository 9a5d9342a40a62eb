"""What the subcommands print, and how `fraudgate train` shares out its arguments."""

from __future__ import annotations

import pytest

from deploy import training
from deploy.commands import status_table
from deploy.pages.settings import page
from deploy.services import local_services
from deploy.stack import ServiceStatus
from gateway.contracts.settings import Settings, load_settings, settings_env


def test_status_is_a_table_with_readable_units() -> None:
    table = status_table(
        [
            ServiceStatus("kafka", "running", 4711, 19092, "ok", 331.7, 3725.0),
            ServiceStatus("gateway", "stopped", None, 18080, "died", 0.0, 0.0),
        ]
    )
    assert table.splitlines() == [
        "service  state    pid   port   health  memory   uptime",
        "kafka    running  4711  19092  ok      332 MiB  1 h 02 m",
        "gateway  stopped  -     18080  died    -        -",
    ]


@pytest.mark.parametrize(("health", "well"), [("ok", True), ("-", True), ("failing", False), ("died", False)])
def test_what_was_started_and_died_is_not_well(health: str, well: bool) -> None:
    assert ServiceStatus("redis", "stopped", None, 1, health, 0.0, 0.0).well is well


def test_train_gives_each_half_its_own_arguments() -> None:
    first, second = training.split(["--from", "2018-07-25", "--name", "other", "--as-of=-1", "--alias", "challenger"])
    assert first == ["--from=2018-07-25", "--as-of=-1"]
    assert second == ["--name=other", "--alias=challenger"]


def test_train_refuses_options_of_a_training_set_it_would_not_build(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        training.split(["--training-set-version", "3", "--to", "2018-08-01"])
    assert exited.value.code == 2
    assert "--training-set-version takes a training set as it is" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "status", "calls"), [([], 0, 2), ([], 3, 1), (["--training-set-version", "3"], 3, 1)])
def test_a_failed_training_set_ends_training(argv: list[str], status: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def half(given: list[str]) -> int:
        called.append(given)
        return status

    monkeypatch.setattr(training, "training_set", half)
    monkeypatch.setattr(training, "train_model", half)
    assert training.train(argv) == status
    assert len(called) == calls


def test_a_child_started_elsewhere_gets_the_same_settings() -> None:
    settings = Settings(home="relative/home", kafka_port=20_001, redis_url="redis://elsewhere:1/0")
    there = load_settings(settings_env(settings))
    assert there.home_path == settings.home_path
    assert (there.kafka_port, there.redis) == (20_001, "redis://elsewhere:1/0")


def test_the_page_of_settings_names_units_ranges_and_defaults() -> None:
    assert "| `FRAUDGATE_KAFKA_PARTITIONS` | `4` | 1 to 1,024 |" in page()
    assert "| `FRAUDGATE_TABLES_URI` | empty | text |" in page()
    assert "| `FRAUDGATE_REGISTRY_URL` | empty | http:// or https:// with a host |" in page()


def test_up_all_starts_jobs_gateway_and_cases_after_what_they_need() -> None:
    services = local_services(Settings(cases_port=12345))
    assert [s.name for s in services.values() if not s.core and s.wanted][:3] == ["jobs", "gateway", "cases"]
    assert services["cases"].ports == {"FRAUDGATE_CASES_PORT": 12345}
