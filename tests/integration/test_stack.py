"""The local stack on real processes."""

from __future__ import annotations

import pytest

from deploy.stack import Stack

pytestmark = pytest.mark.integration


def test_every_core_service_is_well(stack: Stack) -> None:
    health = {entry.name: entry.health for entry in stack.status() if entry.name in stack.core_names}
    assert health == {"kafka": "ok", "redis": "ok", "registry": "ok", "mlflow": "ok"}
