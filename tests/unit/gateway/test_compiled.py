"""Where the kernels' machine code is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gateway
from gateway.kernels import compiled


def cache_dir_of(root: Path) -> Path:
    """Where a copy of the package would keep its machine code."""
    told = subprocess.run(
        [sys.executable, "-c", "from gateway.kernels.compiled import CACHE_DIR; print(CACHE_DIR)"],
        cwd=root,
        env={k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(told.stdout.strip())


def test_a_change_of_a_contract_makes_the_kernels_compile_anew(tmp_path: Path) -> None:
    shutil.copytree(Path(gateway.__file__).parent, tmp_path / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    before = cache_dir_of(tmp_path)
    assert before.parent == tmp_path / "gateway/kernels/__pycache__"
    assert cache_dir_of(tmp_path) == before
    layout = tmp_path / "gateway/contracts/layout.py"
    layout.write_text(layout.read_text().replace("LAYOUT_VERSION = 4", "LAYOUT_VERSION = 5"))
    assert cache_dir_of(tmp_path) != before


def test_machine_code_of_the_newest_states_stays_and_older_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = tmp_path / "kernels-now"
    monkeypatch.setattr(compiled, "CACHE_DIR", now)
    for age, name in enumerate(["now", "1", "2", "3", "4"]):
        (tmp_path / f"kernels-{name}").mkdir()
        os.utime(tmp_path / f"kernels-{name}", (1_000_000 - age, 1_000_000 - age))
    os.utime(now, (1, 1))
    compiled.forget_old()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels-1", "kernels-2", "kernels-now"]
