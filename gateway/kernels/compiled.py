"""How the kernels are compiled: by numba, when first called, kept beside the source; `python -m gateway.kernels.warm` does it ahead.

A kernel is a loop over bytes and numbers that Python or numpy would spend most of a decision's time on. Each has a slow twin in
tests/agreement, written with numpy or in plain Python, that it must equal to the bit: so no fast-math, and no fused operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """`function` as machine code. Indices are not checked: a kernel checks what comes from outside itself."""
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return kernel
