"""Where the kernels' machine code is kept, and that it is there in time."""

from __future__ import annotations

import json
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


# Which kernels the gateway's modules call, and whether each has its machine code once `warm` is through.
WARMED = """
import json, sys
import gateway.app
from gateway.warm import warm
from numba.core.registry import CPUDispatcher

warm()
modules = [module for name, module in sys.modules.items() if name.startswith("gateway.") and ".kernels." not in name]
kernels = [value for module in modules for value in vars(module).values() if isinstance(value, CPUDispatcher)]
print(json.dumps({kernel.py_func.__name__: bool(kernel.signatures) for kernel in kernels}))
"""


def test_no_request_waits_for_a_kernel_to_be_compiled() -> None:
    ended = subprocess.run([sys.executable, "-c", WARMED], capture_output=True, text=True, check=True)
    warmed: dict[str, bool] = json.loads(ended.stdout)
    assert {"decode", "replies_end", "bulks_in", "write_receipts"} <= warmed.keys()
    assert [name for name, has_code in warmed.items() if not has_code] == []


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
