"""What was sent: when it was meant to go out, when it did, through which door, and the truth. Accounting reads it."""

from __future__ import annotations

import threading
from array import array

DOORS = ("http", "kafka")


class Ledger:
    """One row a payment, in order of sending; 60 bytes and its id each. Written by senders, read by the accountant's thread.

    Each list is appended to before `rows` names the row, so a reader that finds a row finds its values.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ids: list[str] = []
        self.intended_s = array("d")
        self.sent_s = array("d")
        self.is_fraud = array("b")
        self.door = array("b")
        self.rows: dict[str, int] = {}
        # (partition, offset) in the transactions topic to row, for messages of which only the position is known.
        self.positions: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, transaction_id: str, is_fraud: bool, door: str, intended_s: float, sent_s: float) -> int:
        """Note a payment, seconds since the epoch. Its row."""
        with self._lock:
            row = len(self.ids)
            self.ids.append(transaction_id)
            self.intended_s.append(intended_s)
            self.sent_s.append(sent_s)
            self.is_fraud.append(is_fraud)
            self.door.append(DOORS.index(door))
            self.rows[transaction_id] = row
        return row
