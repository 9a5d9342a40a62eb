"""Fixtures of the whole suite: one set of settings and one real stack a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from deploy.stack import Stack
from deploy.toolchain import spark_env
from gateway.contracts.settings import ENV_PREFIX, Settings, settings_env
from tests.helpers import local_settings

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure() -> None:
    # Whoever ends the run politely gets the same clean-up as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In two processes (`make test`) a file's tests stay together, and what uses the stack takes the longest: it begins first."""
    files = {item.nodeid.partition("::")[0] for item in items if "stack" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in files)


@pytest.fixture(autouse=True)
def as_nice_as_before() -> Iterator[None]:
    """A test that made this process nice would starve all that follow: the process can't go back."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    yield
    assert os.getpriority(os.PRIO_PROCESS, 0) == niceness, "this test made the process of the tests nice"


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Free ports and an empty home, also in the environment, so that `load_settings` and subprocesses agree.

    What Spark needs to start in this process is in the environment too.
    """
    made = local_settings(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
            patch.delenv(name)
        for name, value in (settings_env(made) | spark_env(made.cache_path)).items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="session")
def stack(settings: Settings) -> Iterator[Stack]:
    """Kafka, Redis, schema registry and MLflow run, topics and schemas exist. At the end everything is stopped."""
    running = Stack(settings, say=lambda line: print(line, flush=True))
    try:
        running.up()
        yield running
    finally:
        running.stop()
