"""What a service says before it starts on files that it can't go on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.kafka_config import RELEASE
from deploy.services import ServiceFilesError, data_path, local_services
from gateway.contracts.settings import Settings


def formatted(home: Path, release: str | None) -> Settings:
    """Settings of a home whose Kafka directory is formatted, by `release` if there is a note of it."""
    settings = Settings(home=str(home))
    log = data_path(settings, "kafka") / "log"
    log.mkdir(parents=True)
    (log / "meta.properties").touch()
    if release is not None:
        (log.parent / "release").write_text(release)
    return settings


@pytest.mark.parametrize("release", [None, "4.3", "10.0"])
def test_kafka_does_not_start_on_what_a_later_release_has_written(tmp_path: Path, release: str | None) -> None:
    settings = formatted(tmp_path, release)
    with pytest.raises(ServiceFilesError, match="move it away"):
        local_services(settings)["kafka"].prepare()


@pytest.mark.parametrize("release", [RELEASE, "3.9"])
def test_kafka_starts_on_what_its_own_or_an_earlier_release_has_written(tmp_path: Path, release: str) -> None:
    local_services(formatted(tmp_path, release))["kafka"].prepare()
