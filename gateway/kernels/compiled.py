"""How the kernels are compiled: by numba, when first called, kept beside the source; `python -m gateway.warm` does it ahead.

A kernel is a loop over bytes and numbers that Python or numpy would spend most of a decision's time on. Each has a slow twin in
tests/agreement, written with numpy or in plain Python, that it must equal to the bit: so no fast-math, and no fused operations.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])

HERE = Path(__file__).parent


# Machine code of earlier states of the sources that stays: a gateway of the version before may be started again.
KEPT_STATES = 3


def _sources_digest() -> str:
    """Of the kernels and of the contracts, whose constants are part of the machine code. Numba itself looks at a kernel's own file only,
    so that after a change of a layout it would go on with code for the old one.
    """
    digest = hashlib.sha256()
    for path in sorted((*HERE.glob("*.py"), *(HERE.parent / "contracts").glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """Where machine code is kept, a folder for each state of the sources: NUMBA_CACHE_DIR, beside the source, or the user's cache."""
    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR)
    return HERE / "__pycache__" if os.access(HERE, os.W_OK) else Path("~/.cache/fraudgate/kernels").expanduser()


CACHE_DIR = cache_root() / f"kernels-{_sources_digest()}"


def compiled(function: F) -> F:
    """`function` as machine code that makes no arrays. Indices are not checked: a kernel checks what comes from outside itself.

    References to arrays are not counted in it, which numba would do at each use of one in a loop, with the processor's atomic operations:
    half of what a kernel over bytes costs. Whoever calls it holds them. One that makes arrays does not compile: see `allocating`.
    """
    return _compiled(function, counts_references=False)


def allocating(function: F) -> F:
    """The same of one that makes arrays, of working space for instance: it should leave its loops to others."""
    return _compiled(function, counts_references=True)


def _compiled(function: F, *, counts_references: bool) -> F:
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(CACHE_DIR)
    try:
        kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy", _nrt=counts_references)(function)
    finally:
        numba.config.CACHE_DIR = before
    return kernel


def forget_old() -> None:
    """Remove the machine code of all but the newest states of the sources."""
    states = sorted(CACHE_DIR.parent.glob("kernels-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [path for path in states if path != CACHE_DIR][KEPT_STATES - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
