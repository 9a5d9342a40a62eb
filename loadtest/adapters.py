"""The public data sets as payments and labels: recognised by their columns, read in bounded batches, never copied.

What a file says about fraud becomes labels, FRAUD_LABEL_DELAY_MS after the payment, and the truth that accounting compares with;
nothing of it enters a transaction. Event times are exact UTC, rows keep the file's order.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gateway.contracts.label import Label
from gateway.contracts.transaction import Transaction
from loadtest.events import Event, LoadError

BATCH_ROWS = 8_192
DAY_MS = 86_400_000
FRAUD_LABEL_DELAY_MS = 7 * DAY_MS

# The nearest ISO 18245 merchant category of each of the generator's categories.
SPARKOV_MCC: dict[str, str] = {
    "entertainment": "7999",
    "food_dining": "5812",
    "gas_transport": "5541",
    "grocery_net": "5411",
    "grocery_pos": "5411",
    "health_fitness": "7997",
    "home": "5712",
    "kids_pets": "5995",
    "misc_net": "5999",
    "misc_pos": "5999",
    "personal_care": "7230",
    "shopping_net": "5311",
    "shopping_pos": "5311",
    "travel": "4722",
}
HANDBOOK_MCC = "5999"


def _minor(amounts: list[float]) -> list[int]:
    """Cents, to the nearest: some of the files' sums are not the double nearest to a number of two decimals."""
    out: list[int] = np.rint(np.array(amounts, np.float64) * 100).astype(np.int64).tolist()
    return out


def _handbook(columns: dict[str, list[Any]], times_ms: list[int]) -> list[Event]:
    return [
        Event(
            Transaction(
                transaction_id=f"hb-{transaction}",
                event_time_ms=at_ms,
                card_id=f"hb-c{customer}",
                customer_id=f"hb-c{customer}",
                merchant_id=f"hb-t{terminal}",
                amount_minor=minor,
                currency="EUR",
                channel="pos",
                mcc=HANDBOOK_MCC,
                country="BE",
            ),
            fraud != 0,
            None,
        )
        for transaction, at_ms, customer, terminal, minor, fraud in zip(
            columns["TRANSACTION_ID"],
            times_ms,
            columns["CUSTOMER_ID"],
            columns["TERMINAL_ID"],
            _minor(columns["TX_AMOUNT"]),
            columns["TX_FRAUD"],
            strict=True,
        )
    ]


@lru_cache(maxsize=10_000)
def merchant_slug(name: str) -> str:
    """A merchant's name within the pattern of ids. Every name in the file starts with "fraud_", which means nothing: it goes."""
    return "sk-m-" + re.sub(r"[^a-z0-9]+", "-", name.removeprefix("fraud_").lower()).strip("-")[:56]


def _sparkov(columns: dict[str, list[Any]], times_ms: list[int]) -> list[Event]:
    return [
        Event(
            Transaction(
                transaction_id=f"sk-{transaction}",
                event_time_ms=at_ms,
                card_id=f"sk-c{card}",
                customer_id=f"sk-c{card}",
                merchant_id=merchant_slug(merchant),
                amount_minor=minor,
                currency="USD",
                channel="ecom" if category.endswith("_net") else "pos",
                mcc=SPARKOV_MCC[category],
                country="US",
                card_country="US",
                latitude=latitude,
                longitude=longitude,
            ),
            fraud != 0,
            None,
        )
        for transaction, at_ms, card, merchant, minor, category, latitude, longitude, fraud in zip(
            columns["transaction_id"],
            times_ms,
            columns["card_id"],
            columns["merchant"],
            _minor(columns["amount"]),
            columns["category"],
            columns["merch_lat"],
            columns["merch_long"],
            columns["is_fraud"],
            strict=True,
        )
    ]


@dataclass(frozen=True)
class Adapter:
    """`columns` are read and needed; `time_column` is a timestamp without zone, UTC."""

    name: str
    time_column: str
    columns: tuple[str, ...]
    convert: Callable[[dict[str, list[Any]], list[int]], list[Event]]


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        "handbook",
        "TX_DATETIME",
        ("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT", "TX_FRAUD"),
        _handbook,
    ),
    Adapter(
        "sparkov",
        "event_time",
        ("transaction_id", "event_time", "card_id", "merchant", "category", "amount", "merch_lat", "merch_long", "is_fraud"),
        _sparkov,
    ),
)


class Dataset:
    """One pass over the rows of a Parquet file with event time in [from_ms, to_ms). Raises `LoadError` for a file it can't read."""

    def __init__(self, path: Path, from_ms: int | None = None, to_ms: int | None = None) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as exc:
            raise LoadError(f"{path} can't be read as a Parquet file: {exc}") from exc
        names = set(self._file.schema_arrow.names)
        for adapter in ADAPTERS:
            if names.issuperset(adapter.columns):
                self.adapter = adapter
                break
        else:
            known = "; ".join(f"{a.name}: {', '.join(a.columns)}" for a in ADAPTERS)
            raise LoadError(f"{path} has the columns of no known data set ({known})")
        self._from_ms = -(2**62) if from_ms is None else from_ms
        self._to_ms = 2**62 if to_ms is None else to_ms
        self._labels: deque[Label] = deque()

    def count(self) -> int:
        """How many rows lie in the range. Reads the time column only."""
        found = 0
        for batch in self._batches((self.adapter.time_column,)):
            times = _times_ms(batch, self.adapter.time_column)
            found += int(((times >= self._from_ms) & (times < self._to_ms)).sum())
        return found

    def events(self) -> Iterator[Event]:
        """The rows in the file's order. Raises `LoadError` when event time runs backwards."""
        last_ms = self._from_ms
        for batch in self._batches(self.adapter.columns):
            times = _times_ms(batch, self.adapter.time_column)
            inside = np.flatnonzero((times >= self._from_ms) & (times < self._to_ms))
            if len(inside) == 0:
                continue
            # Times ascend, so the rows of a range lie together; if they didn't, the check below would tell.
            first, last = int(inside[0]), int(inside[-1]) + 1
            kept = times[first:last]
            if int(kept[0]) < last_ms or (np.diff(kept) < 0).any():
                raise LoadError(f"the rows of the {self.adapter.name} file are not in order of {self.adapter.time_column}")
            last_ms = int(kept[-1])
            columns = batch.slice(first, last - first).to_pydict()
            for event in self.adapter.convert(columns, kept.tolist()):
                if event.is_fraud:
                    self._labels.append(_label(event.transaction))
                yield event

    def labels_due(self, now_ms: int) -> list[Label]:
        """Labels that became known by `now_ms` and were not handed out yet."""
        due = []
        while self._labels and self._labels[0].reported_at_ms <= now_ms:
            due.append(self._labels.popleft())
        return due

    def labels_remaining(self) -> list[Label]:
        return self.labels_due(2**62)

    def _batches(self, columns: tuple[str, ...]) -> Iterator[Any]:
        """Record batches of the row groups that can hold rows of the range."""
        at = self._file.schema_arrow.names.index(self.adapter.time_column)
        groups = []
        for i in range(self._file.metadata.num_row_groups):
            statistics = self._file.metadata.row_group(i).column(at).statistics
            if statistics is not None and statistics.has_min_max:
                least, most = (int(np.datetime64(v, "ms").astype(np.int64)) for v in (statistics.min, statistics.max))
                if most < self._from_ms or least >= self._to_ms:
                    continue
            groups.append(i)
        if groups:
            yield from self._file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns))


def _times_ms(batch: Any, column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    times = batch.column(column).to_numpy(zero_copy_only=False)
    return np.asarray(times.astype("datetime64[ms]").astype(np.int64))


def _label(t: Transaction) -> Label:
    return Label(
        transaction_id=t.transaction_id,
        card_id=t.card_id,
        is_fraud=True,
        source="chargeback",
        state="confirmed",
        reported_at_ms=t.event_time_ms + FRAUD_LABEL_DELAY_MS,
        amount_minor=t.amount_minor,
    )
