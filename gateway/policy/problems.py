"""What is wrong with a policy, each with its place: file, line and column, both from 1, as editors count."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.errors import PolicyRefusedError

# So many are told at once, and no more looked for once there are; a file of something else altogether has thousands.
PROBLEMS_MAX = 50


@dataclass(frozen=True, order=True)
class Problem:
    """`file` is relative to the policy's folder."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class Problems:
    """All that was found so far."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    @property
    def enough(self) -> bool:
        return len(self.found) >= PROBLEMS_MAX

    def add(self, file: str, line: int, column: int, text: str) -> None:
        self.found.append(Problem(file, line, column, text))

    def raise_any(self, source: str) -> None:
        """Raises `PolicyRefusedError` with all of them, by place, when there are any. `source` is where the policy came from."""
        if not self.found:
            return
        told = sorted(set(self.found))
        lines = [f"{source}/{problem}" for problem in told[:PROBLEMS_MAX]]
        if len(told) > PROBLEMS_MAX:
            lines.append("and more")
        raise PolicyRefusedError("\n".join(lines))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` when a known name looks like `name`, else nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
