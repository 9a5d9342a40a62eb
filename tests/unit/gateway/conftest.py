from pathlib import Path

import msgspec
import pytest

from gateway.contracts.model_meta import read_manifest, write_manifest
from tests.unit.gateway.factories import write_model


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a champion, version 1, a challenger, 2, and shadows, 3 and 4."""
    folder = tmp_path_factory.mktemp("models")
    routes = {}
    for i, route in enumerate(("champion", "challenger", "shadow", "shadow-b")):
        routes[route] = write_model(folder, str(i + 1), seed=i + 1).routes["champion"]
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), routes=routes))
    return folder
