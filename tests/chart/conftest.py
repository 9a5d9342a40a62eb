"""Programs and an API server for the tests of the chart. `make test-chart` builds the programs first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chart import tools as built
from tests.chart.apiserver import ApiServer, serve
from tests.chart.tools import Tools

NOT_BUILT = "is not built: make test-chart does that first"


@pytest.fixture(scope="session")
def tools() -> Tools:
    """helm is there; the rest may not be."""
    found = built.tools()
    if not found.helm.is_file():
        pytest.skip(f"helm {NOT_BUILT}")
    return found


@pytest.fixture(scope="session")
def server(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if not built.complete(tools):
        pytest.skip(f"the API server {NOT_BUILT}")
    with serve(tools, tmp_path_factory.mktemp("apiserver")) as found:
        yield found
