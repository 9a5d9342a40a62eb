"""A batch of transactions as columns, read once from their Avro records by a kernel, for all that looks at a batch.

Made by the scorer and, to decode a chunk from Kafka, by its door. About a microsecond a transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.transaction import Transaction
from gateway.kernels.digests import DIGEST_BYTES, md5
from gateway.kernels.intake import CLEAN, TEXT_INDEX, TEXTS, TRANSACTION_ID, read_records
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

    def texts(self, name: str, rows: Int64s) -> list[str | None]:
        """A text field of `rows`, which have been read. What was checked is ASCII."""
        place = TEXT_INDEX[name]
        # Bytes of numbers between the texts decode to something in Latin-1, and one byte stays one character.
        text = self.data.decode("latin-1")
        return [
            None if length < 0 else text[start : start + length]
            for start, length in zip(self.starts[rows, place].tolist(), self.lengths[rows, place].tolist(), strict=True)
        ]

    def ids(self) -> list[str]:
        """The transaction_id of each row; all have been read."""
        text = self.data.decode("latin-1")
        starts = self.starts[:, 0]
        return [text[a:b] for a, b in zip(starts.tolist(), (starts + self.lengths[:, 0]).tolist(), strict=True)]

    def cards(self) -> list[bytes]:
        """The card_id of each row; all have been read."""
        data, starts = self.data, self.starts[:, 1]
        return [data[a:b] for a, b in zip(starts.tolist(), (starts + self.lengths[:, 1]).tolist(), strict=True)]


def edges_of(parts: Sequence[bytes]) -> Int64s:
    """Where each of `parts` begins when they are joined, and where the last one ends."""
    edges = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=edges[1:])
    return edges


def fingerprints_of(requests: Requests) -> bytes:
    """gateway.scoring.job.fingerprint_of each row's record, one after the other."""
    out = np.empty((len(requests), DIGEST_BYTES), np.uint8)
    md5(requests.buf, requests.edges[:-1], np.diff(requests.edges), out)
    return out.tobytes()


def hashes_of(requests: Requests) -> npt.NDArray[np.uint64]:
    """contracts.layout.txn_hash of each row, (rows,)."""
    out = np.empty((len(requests), DIGEST_BYTES), np.uint8)
    md5(requests.buf, requests.starts[:, TRANSACTION_ID], requests.lengths[:, TRANSACTION_ID], out)
    return out.view("<u8")[:, 0].copy()


def read_requests(payloads: Sequence[bytes], now_ms: Int64s) -> Requests:
    """`payloads` are records of schemas/transaction.avsc, `now_ms` (rows,) the times of arrival, -1 where they have been checked."""
    return read_joined(b"".join(payloads), edges_of(payloads), now_ms)


def read_joined(data: bytes, edges: Int64s, now_ms: Int64s) -> Requests:
    """The same of records that are one text already."""
    rows = len(edges) - 1
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


def transactions_of(requests: Requests, least: int = CLEAN) -> list[Transaction | None]:
    """The transactions of the rows whose state is `least` or better, None for the others. About 2 us each."""
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
        if state < least:
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
