"""Programs that only Debian's packages bring. Where one is missing its tests are left out and say so; in CI they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.toolchain import (
    ToolMissingError,
    find_alertmanager,
    find_amtool,
    find_chromedriver,
    find_chromium,
    find_haproxy,
    find_prometheus,
    find_promtool,
)

IN_CI = os.environ.get("CI", "").lower() == "true"
TOOLS: dict[str, Callable[[], Path]] = {"promtool": find_promtool, "amtool": find_amtool}
RUN_TIMEOUT_S = 120


def needs(*finds: Callable[[], Path]) -> pytest.MarkDecorator:
    """Marks tests that need these programs."""
    for find in finds:
        try:
            find()
        except ToolMissingError as exc:
            return pytest.mark.skipif(not IN_CI, reason=str(exc))
    return pytest.mark.skipif(False, reason="")


needs_prometheus = needs(find_prometheus, find_promtool)
needs_alertmanager = needs(find_alertmanager, find_amtool)
needs_haproxy = needs(find_haproxy)
needs_chromium = needs(find_chromium, find_chromedriver)


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of `TOOLS`, from start to end. Its status is not checked."""
    return subprocess.run([str(TOOLS[name]()), *arguments], capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
