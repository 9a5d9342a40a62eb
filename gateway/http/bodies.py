"""Bodies of POST /score to checked records: whole batches by a kernel, what it can't be certain of one by one. Called by the batcher."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gateway.contracts.transaction import RefusedError, check, parse_json
from gateway.kafka.avro import encode_transaction
from gateway.kernels.intake import CLEAN
from gateway.kernels.json import write_transactions
from gateway.scoring.requests import Requests, edges_of, read_joined


def read_bodies(bodies: Sequence[bytes], now_ms: int) -> tuple[list[bytes | RefusedError], Requests | None]:
    """For each body its record of schemas/transaction.avsc or why it is refused, and the columns of all when none had to be read slowly.

    `now_ms` is the time of arrival.
    """
    rows = len(bodies)
    data = b"".join(bodies)
    written, edges = np.empty(len(data), np.uint8), np.empty(rows + 1, np.int64)
    write_transactions(np.frombuffer(data, np.uint8), edges_of(bodies), written, edges, np.empty(rows, np.bool_))
    records = written[: edges[-1]].tobytes()
    requests = read_joined(records, edges, np.full(rows, now_ms, np.int64))
    cuts = edges.tolist()
    found: list[bytes | RefusedError] = [records[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    unclear = np.flatnonzero(requests.state != CLEAN).tolist()
    for row in unclear:
        found[row] = _read_slowly(bodies[row], now_ms)
    return found, None if unclear else requests


def _read_slowly(body: bytes, now_ms: int) -> bytes | RefusedError:
    try:
        t = parse_json(body)
        check(t, now_ms)
    except RefusedError as exc:
        return exc
    return encode_transaction(t)
