"""What the simulator and the public data sets have in common: payments in event-time order, the truth, and labels in due time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from gateway.contracts.label import Label
from gateway.contracts.transaction import Transaction


class Event(NamedTuple):
    """A payment and the truth about it, which no transaction carries. `pattern` names what kind of fraud it is, if known."""

    transaction: Transaction
    is_fraud: bool
    pattern: str | None


class LoadError(RuntimeError):
    """The load can't be sent or read as asked. The message says what to change."""


class Source(Protocol):
    """One pass over a stream of payments. Labels follow `events`: call `labels_due` with event times as they come."""

    def events(self) -> Iterator[Event]: ...

    def labels_due(self, now_ms: int) -> list[Label]: ...

    def labels_remaining(self) -> list[Label]: ...
