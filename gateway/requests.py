"""A batch of transactions as columns, read once from their Avro records by a kernel, for all that looks at a batch.

Made by the scorer and, to decode a chunk from Kafka, by its door. About a microsecond a transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.transaction import Transaction
from gateway.kernels.intake import CLEAN, TEXTS, read_records
from gateway.kernels.raw import Bytes

Int64s = npt.NDArray[np.int64]


@dataclass(slots=True)
class Requests:
    """Columns of `gateway.kernels.intake.read_records`, by row. A row whose `state` is UNREAD has no meaning."""

    data: bytes
    buf: Bytes
    edges: Int64s
    starts: Int64s
    lengths: Int64s
    numbers: Int64s
    places: npt.NDArray[np.float64]
    state: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.state)

    @property
    def t_ms(self) -> Int64s:
        return self.numbers[:, 0]

    @property
    def amount_minor(self) -> Int64s:
        return self.numbers[:, 1]


def read_requests(payloads: Sequence[bytes], now_ms: Int64s) -> Requests:
    """`payloads` are records of schemas/transaction.avsc, `now_ms` (rows,) the times of arrival, -1 where they have been checked."""
    rows = len(payloads)
    data = b"".join(payloads)
    edges = np.zeros(rows + 1, np.int64)
    np.cumsum(np.fromiter(map(len, payloads), np.int64, rows), out=edges[1:])
    requests = Requests(
        data=data,
        buf=np.frombuffer(data, np.uint8),
        edges=edges,
        starts=np.empty((rows, len(TEXTS)), np.int64),
        lengths=np.empty((rows, len(TEXTS)), np.int64),
        numbers=np.empty((rows, 4), np.int64),
        places=np.empty((rows, 3), np.float64),
        state=np.empty(rows, np.uint8),
    )
    r = requests
    read_records(r.buf, r.edges, now_ms, r.starts, r.lengths, r.numbers, r.places, r.state)
    return requests


# What `is_clean` has no use for.
_STARTS, _LENGTHS = np.empty((1, len(TEXTS)), np.int64), np.empty((1, len(TEXTS)), np.int64)
_NUMBERS, _PLACES = np.empty((1, 4), np.int64), np.empty((1, 3), np.float64)
_STATE = np.empty(1, np.uint8)
_EDGES = np.zeros(2, np.int64)
_NOW_MS = np.empty(1, np.int64)


def is_clean(payload: bytes, now_ms: int) -> bool:
    """True when one record passes all of contracts.transaction.check for certain. 3 us, of which the regular expressions take 8."""
    _EDGES[1], _NOW_MS[0] = len(payload), now_ms
    read_records(np.frombuffer(payload, np.uint8), _EDGES, _NOW_MS, _STARTS, _LENGTHS, _NUMBERS, _PLACES, _STATE)
    return bool(_STATE[0] == CLEAN)


def transactions_of(requests: Requests) -> list[Transaction | None]:
    """The transactions of the CLEAN rows, None for the others. About 2 us each."""
    # What is clean is ASCII; bytes of numbers between the texts decode to something in Latin-1, and one byte stays one character.
    text = requests.data.decode("latin-1")
    ends = np.maximum(requests.starts + requests.lengths, 0).tolist()
    places = requests.places.tolist()
    found: list[Transaction | None] = []
    for row, (starts, stops, sizes, numbers, state) in enumerate(
        zip(
            requests.starts.tolist(),
            ends,
            requests.lengths[:, 8:].tolist(),
            requests.numbers.tolist(),
            requests.state.tolist(),
            strict=True,
        )
    ):
        if state != CLEAN:
            found.append(None)
            continue
        device, ip, card_bin, card_country = sizes
        latitude, longitude, _ = places[row]
        found.append(
            Transaction(
                transaction_id=text[starts[0] : stops[0]],
                event_time_ms=numbers[0],
                card_id=text[starts[1] : stops[1]],
                customer_id=text[starts[2] : stops[2]],
                merchant_id=text[starts[3] : stops[3]],
                amount_minor=numbers[1],
                currency=text[starts[4] : stops[4]],
                channel=text[starts[5] : stops[5]],  # type: ignore[arg-type]
                mcc=text[starts[6] : stops[6]],
                country=text[starts[7] : stops[7]],
                device_id=None if device < 0 else text[starts[8] : stops[8]],
                ip=None if ip < 0 else text[starts[9] : stops[9]],
                card_bin=None if card_bin < 0 else text[starts[10] : stops[10]],
                card_country=None if card_country < 0 else text[starts[11] : stops[11]],
                # NaN is what the kernel makes of null, and equals nothing.
                latitude=latitude if latitude == latitude else None,
                longitude=longitude if longitude == longitude else None,
            )
        )
    return found
