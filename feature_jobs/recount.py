"""A recount of single rows of one entity by the gateway's own arithmetic, over raw events instead of heads and tiles.

For the parity check's rows that were observed out of order of event time. Cost: all of an id's past for each row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from feature_jobs.offline import History, take
from gateway.contracts.feature_matrix import feature_matrix
from gateway.contracts.features import ENTITIES
from gateway.contracts.layout import FRAUD_HOUR, HEAD_EVENT
from gateway.contracts.windows import DAY_MS, HOUR_MS, LABELLED_RETENTION_MS, Asked, Int64s, aggregate, boundary, nothing_held

RECORDS_MAX = 2_000_000
# What no gateway observed stands so far before everything observed that no head counts it.
UNOBSERVED_PLACES = 1_000_000


class Recount:
    """`entity` indexes ENTITIES and the columns of `history`, whose `seq` numbers the observed rows of an id from 0.

    `applied` (rows,) is how many label changes of its id each row counts.
    """

    def __init__(self, history: History, entity: int, applied: Int64s) -> None:
        self._applied = applied
        self._history, self._entity = history, entity
        columns = history.entities[entity]
        assert columns.seq is not None
        self._rank = columns.seq
        self._by_code = np.argsort(columns.code, kind="stable")
        self._codes = columns.code[self._by_code]
        changes = history.labels[entity] if history.labels else None
        self._changes = changes
        if changes is not None:
            self._change_code = columns.code[changes.row]

    def features(self, rows: Int64s) -> npt.NDArray[np.float32]:
        """All features of `rows`, (rows, len(FEATURES)); only those of the entity are meant."""
        return np.concatenate([self._some(some) for some in self._chunks(rows)])

    def _chunks(self, rows: Int64s) -> Iterator[Int64s]:
        code = self._history.entities[self._entity].code[rows]
        past = np.searchsorted(self._codes, code, side="right") - np.searchsorted(self._codes, code)
        chunk = np.cumsum(past) // RECORDS_MAX
        for i in np.unique(chunk):
            yield rows[chunk == i]

    def _some(self, rows: Int64s) -> npt.NDArray[np.float32]:
        columns, t_all = self._history.entities[self._entity], self._history.request.t_ms
        code = columns.code[rows]
        first, end = np.searchsorted(self._codes, code), np.searchsorted(self._codes, code, side="right")
        lengths = end - first
        owner = np.repeat(np.arange(len(rows)), lengths)
        past = self._by_code[np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))]
        t_ms = t_all[rows]
        before = self._rank[past] < self._rank[rows][owner]
        before &= t_all[past] >= t_ms[owner] - LABELLED_RETENTION_MS - DAY_MS
        # Nobody counts history from a head, so none at or after the boundary.
        before &= (self._rank[past] >= 0) | (t_all[past] < boundary(t_ms)[owner])
        past, owner = past[before], owner[before]
        head = np.zeros(len(past), HEAD_EVENT)
        head["event_time_ms"] = t_all[past]
        head["amount_minor"] = self._history.request.amount_minor[past]
        head["seq"] = np.where(self._rank[past] < 0, 0, self._rank[past] + UNOBSERVED_PLACES)
        head["latitude"] = self._history.request.latitude[past]
        head["longitude"] = self._history.request.longitude[past]
        for name in ("dim_a", "dim_b", "dim_c"):
            head[name] = getattr(columns, name)[past]
        held = nothing_held(len(rows))
        held.head, held.heads = head, np.bincount(owner, minlength=len(rows))
        held.frauds, held.fraud_hours = self._frauds(rows, code)
        asked = Asked(
            t_ms=t_ms,
            seq=self._rank[rows] + UNOBSERVED_PLACES,
            capacity=np.full(len(rows), ENTITIES[self._entity].head_events_max),
            dim_a=columns.dim_a[rows],
            dim_c=columns.dim_c[rows],
        )
        request = take(self._history.request, rows)
        known = np.zeros((len(rows), len(ENTITIES)), bool)
        known[:, self._entity] = True
        # feature_matrix wants an owner for each entity; the others' are not looked at.
        found = aggregate(asked, held)
        spread = np.repeat(np.arange(len(rows)), len(ENTITIES))
        return feature_matrix(request, type(found)(*(getattr(found, f)[..., spread] for f in vars(found))), known)

    def _frauds(self, rows: Int64s, code: Int64s) -> tuple[npt.NDArray[np.void], Int64s]:
        """The hours of frauds that each row knew of."""
        changes = self._changes
        if changes is None or not len(changes.row):
            return np.zeros(0, FRAUD_HOUR), np.zeros(len(rows), np.int64)
        records, lengths = [], np.zeros(len(rows), np.int64)
        for i, (row, own) in enumerate(zip(rows.tolist(), code.tolist(), strict=True)):
            mine = np.flatnonzero((self._change_code == own) & (changes.known < self._applied[row]))
            hours, at = np.unique(self._history.request.t_ms[changes.row[mine]] // HOUR_MS, return_inverse=True)
            frauds = np.bincount(at, changes.change[mine], len(hours)).astype(np.int64)
            record = np.zeros(len(hours), FRAUD_HOUR)
            record["hour"], record["frauds"] = hours, frauds
            records.append(record)
            lengths[i] = len(hours)
        return np.concatenate(records), lengths
