"""Has every kernel compiled, or loaded from where an earlier run left it: `python -m gateway.warm`, and each gateway before it serves.

Takes about half a minute the first time after a change of a kernel, and about a second later.
"""

from __future__ import annotations

import numpy as np

from gateway.contracts.decision import RoutedBy
from gateway.contracts.transaction import Transaction, encode_json
from gateway.explanations import explain
from gateway.http.bodies import read_bodies
from gateway.kernels.compiled import forget_old
from gateway.kernels.intake import CARD
from gateway.kernels.points import points
from gateway.policy import NO_LISTS, Columns, load_policy
from gateway.redis.link import RedisLink
from gateway.redis.store import Store
from gateway.scoring.answers import encode_answers, gather
from gateway.scoring.job import http_job
from gateway.scoring.receipts import Decided, encode_receipts
from gateway.scoring.requests import fingerprints_of

_T_MS = 1_700_000_000_000


def warm() -> None:
    """Decides nothing, and asks nobody."""
    t = Transaction(
        transaction_id="warm",
        event_time_ms=_T_MS,
        card_id="card",
        customer_id="customer",
        merchant_id="merchant",
        amount_minor=1,
        currency="EUR",
        channel="pos",
        mcc="5411",
        country="DE",
        device_id="device",
        ip="ip",
    )
    explain.warm()
    [payload], requests = read_bodies([encode_json(t)], _T_MS)
    assert isinstance(payload, bytes), "the transaction above is a good one"
    assert requests is not None, "the kernels read it"
    job = http_job(t.transaction_id, t.card_id.encode(), payload, fingerprints_of(requests), _T_MS, _T_MS, 0.0, None, 0)
    found = Store(RedisLink("redis://127.0.0.1/0", 1.0), 1).rehearse([job], requests)
    columns = Columns(requests, np.zeros(1, np.int64), found.matrix, np.zeros(1), np.zeros(1, np.int64))
    load_policy("").decide(columns, True, NO_LISTS)
    points(requests.buf, requests.starts, requests.lengths, np.zeros(1, np.int64), CARD, np.uint64(0), np.empty(1))
    nothing, zero = gather([((), (), ())]), np.zeros(1, np.int64)
    encode_answers(requests, zero, job.claim, zero, zero, np.zeros(1), nothing, [None], zero, np.zeros(1), 1)
    encode_receipts(
        Decided(
            requests=requests,
            rows=np.zeros(1, np.int64),
            jobs=[job],
            decided_at_ms=_T_MS,
            severity=np.zeros(1, np.int64),
            score=np.zeros(1, np.int64),
            probability=np.zeros(1),
            notes=nothing,
            models=[None],
            model=np.zeros(1, np.int64),
            routed_by=RoutedBy.ONLY,
            policy_severity=np.zeros(1, np.int64),
            propensity=np.ones(1),
            matrix=found.matrix,
            seq=found.seq,
            label_changes=found.label_changes,
            tiles_age_ms=None,
            policy_digest="",
            code_version="",
            admit_us=np.zeros(1, np.int64),
            steps_us=[0, 0, 0],
        )
    )


if __name__ == "__main__":
    warm()
    forget_old()
