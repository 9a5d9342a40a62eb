"""The slow oracle: what each feature's value must be, recounted event by event in plain Python from the documented semantics.

It shares the list of features with the product and nothing else: no tiles, no heads, no numpy.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.contracts.features import ENTITIES, FEATURES, Entity
from gateway.contracts.transaction import CHANNELS, Transaction

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
# name: (length, the grid its tail is rounded down to; 1 for exact)
WINDOWS_MS = {
    "5m": (300_000, 1),
    "1h": (HOUR_MS, 300_000),
    "24h": (DAY_MS, HOUR_MS),
    "7d": (7 * DAY_MS, DAY_MS),
    "30d": (30 * DAY_MS, DAY_MS),
}

LABEL_DELAY_MS = 7 * DAY_MS
LAST_MS_MAX = 31 * DAY_MS
LABEL_WINDOWS_MS = {f"{days}d": days * DAY_MS for days in (1, 3, 7, 14, 30)}


def float32(x: float) -> float:
    """The nearest single-precision number."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def floor_to(t_ms: int, grid_ms: int) -> int:
    return t_ms - t_ms % grid_ms


class LabelChange(NamedTuple):
    """What became known about a payment at `event_time_ms`: +1 it was fraud, -1 it was not after all."""

    event_time_ms: int
    change: int


@dataclass
class Past:
    """What was observed of one entity, in order of observation, and which label changes had been applied."""

    events: list[Transaction] = field(default_factory=list)
    labels: list[LabelChange] = field(default_factory=list)

    def covered(self, entity: Entity, t_ms: int, window: str) -> list[Transaction]:
        """The events that `window` covers for a transaction at `t_ms` that is observed next."""
        length_ms, grid_ms = WINDOWS_MS[window]
        first_ms = floor_to(t_ms - length_ms, grid_ms)
        newest = self.events[-entity.head_events_max :]
        if grid_ms == 1:
            return [e for e in newest if first_ms <= e.event_time_ms <= t_ms]
        boundary_ms = floor_to(t_ms - MINUTE_MS, 5 * MINUTE_MS)
        tiled = [e for e in self.events if first_ms <= e.event_time_ms < boundary_ms]
        return tiled + [e for e in newest if max(boundary_ms, first_ms) <= e.event_time_ms <= t_ms]

    def label_window(self, t_ms: int, window: str) -> tuple[int, int]:
        """(payments, frauds) since a midnight: payments of whole days, the one LABEL_DELAY_MS ago included, frauds of whole hours."""
        first_ms = floor_to(t_ms - LABEL_DELAY_MS, DAY_MS) - LABEL_WINDOWS_MS[window]
        until_ms = floor_to(t_ms - LABEL_DELAY_MS, HOUR_MS)
        return self.payments_since(t_ms, first_ms), sum(c.change for c in self.labels if first_ms <= c.event_time_ms < until_ms)

    def payments_since(self, t_ms: int, first_ms: int) -> int:
        end_ms = floor_to(t_ms - LABEL_DELAY_MS, DAY_MS) + DAY_MS
        return sum(first_ms <= e.event_time_ms < end_ms for e in self.events)

    def fraud_hours(self, t_ms: int) -> list[int]:
        """The hours with a fraud in the longest label window."""
        first_ms = floor_to(t_ms - LABEL_DELAY_MS, DAY_MS) - max(LABEL_WINDOWS_MS.values())
        until_ms = floor_to(t_ms - LABEL_DELAY_MS, HOUR_MS)
        by_hour: dict[int, int] = {}
        for c in self.labels:
            if first_ms <= c.event_time_ms < until_ms:
                hour = floor_to(c.event_time_ms, HOUR_MS)
                by_hour[hour] = by_hour.get(hour, 0) + c.change
        return sorted(hour for hour, frauds in by_hour.items() if frauds > 0)

    def fraud_run(self, t_ms: int) -> tuple[int, int | None, int | None, int]:
        """(frauds, midnight of the first day with one) since the last whole day with a genuine payment, that day's midnight, and the
        payments of whole days after the last day with a fraud."""
        end_ms = floor_to(t_ms - LABEL_DELAY_MS, DAY_MS)
        until_ms = floor_to(t_ms - LABEL_DELAY_MS, HOUR_MS)
        days = range(end_ms - max(LABEL_WINDOWS_MS.values()), end_ms + DAY_MS, DAY_MS)
        frauds = {d: sum(c.change for c in self.labels if d <= c.event_time_ms < min(d + DAY_MS, until_ms)) for d in days}
        paid = {d: sum(d <= e.event_time_ms < d + DAY_MS for e in self.events) for d in days}
        genuine_days = [d for d in days if d < end_ms and paid[d] > frauds[d]]
        genuine = genuine_days[-1] if genuine_days else None
        run = [d for d in days if frauds[d] > 0 and (genuine is None or d > genuine)]
        last = max((d for d in days if frauds[d] > 0), default=end_ms)
        after = sum(paid[d] for d in days if last < d < end_ms)
        return sum(frauds[d] for d in run), run[0] if run else None, genuine, after

    def last(self, entity: Entity, t_ms: int) -> Transaction | None:
        before = [e for e in self.events[-entity.head_events_max :] if e.event_time_ms <= t_ms]
        last = _newest(before) if before else None
        return last if last is not None and last.event_time_ms >= t_ms - LAST_MS_MAX else None


def _newest(events: Sequence[Transaction]) -> Transaction:
    """The one with the latest event time; among equals the one observed last."""
    newest = events[0]
    for e in events:
        if e.event_time_ms >= newest.event_time_ms:
            newest = e
    return newest


def sketched_distinct(values: Sequence[str | None]) -> float:
    """Linear counting over 64 buckets of CRC-32, rounded; a full sketch reads as 63.5 occupied buckets."""
    occupied = min(len({zlib.crc32((v or "").encode()) % 64 for v in values}), 63.5)
    return float(round(-64 * math.log((64 - occupied) / 64)))


def request_value(name: str, t: Transaction) -> float:
    day = t.event_time_ms // DAY_MS
    hour = t.event_time_ms % DAY_MS // HOUR_MS
    weekday = (day + 3) % 7  # 1970-01-01 was a Thursday
    values = {
        "amount_minor": t.amount_minor,
        "hour": hour,
        "weekday": weekday,
        "is_night": hour < 7,
        "is_weekend": weekday >= 5,
        "channel": CHANNELS.index(t.channel),
        "mcc": int(t.mcc),
        "cross_border": math.nan if t.card_country is None else t.card_country != t.country,
    }
    return float(values[name])


def _over(a: float, b: float) -> float:
    return math.nan if b == 0 else a / b


def _history_value(aggregate: str, entity: Entity, amount: int, events: list[Transaction]) -> float:
    n = float(len(events))
    total = float(sum(e.amount_minor for e in events))
    mean = _over(total, n)
    squares = float(sum(min(e.amount_minor, 10_000_000) ** 2 for e in events))
    std = math.nan if n < 2 else math.sqrt(max(squares / n - mean * mean, 0.0))
    if aggregate == "count":
        return n
    if aggregate == "sum":
        return total
    if aggregate == "mean":
        return mean
    if aggregate == "max":
        return float(max((e.amount_minor for e in events), default=math.nan))
    if aggregate == "std":
        return std
    if aggregate == "ratio":
        return _over(float(amount), mean)
    if aggregate == "zscore":
        return _over(float(amount) - mean, std)
    dim = {"distinct_a": entity.dim_a, "distinct_b": entity.dim_b, "distinct_c": entity.dim_c}[aggregate]
    return sketched_distinct([getattr(e, dim) for e in events])


def _compared_value(aggregate: str, amount: int, events: list[Transaction], longest: list[Transaction]) -> float:
    """A window beside the longest, which holds all of its events."""
    if aggregate == "ratio_before":
        before = [e.amount_minor for e in longest if e not in events]
        return _over(float(amount), _over(float(sum(before)), float(len(before))))
    mean = _over(float(sum(e.amount_minor for e in longest)), float(len(longest)))
    newest = [e.amount_minor for e in events]
    if aggregate == "peak":
        return _over(float(max(newest, default=math.nan)), mean)
    assert aggregate == "surge"
    return _over(_over(float(sum(newest)), float(len(newest))), mean)


def pair_hash(value: str | None) -> int:
    return zlib.crc32((value or "").encode()) & 0x7FFF


def _lasting_value(aggregate: str, entity: Entity, t: Transaction, past: Past) -> float:
    if aggregate in {"since_first_fraud", "since_last_fraud", "rate_since_fraud"}:
        hours = past.fraud_hours(t.event_time_ms)
        if not hours:
            return math.nan
        if aggregate == "rate_since_fraud":
            _, frauds = past.label_window(t.event_time_ms, max(LABEL_WINDOWS_MS, key=lambda w: LABEL_WINDOWS_MS[w]))
            return _over(float(frauds), float(past.payments_since(t.event_time_ms, floor_to(hours[0], DAY_MS))))
        return (t.event_time_ms - hours[0 if aggregate == "since_first_fraud" else -1]) / 1000.0
    if aggregate in {"fraud_run", "since_fraud_run", "since_genuine", "payments_after_fraud"}:
        return _run_value(aggregate, t.event_time_ms, past)
    if aggregate in {"new_a", "new_c"}:
        dim = entity.dim_a if aggregate == "new_a" else entity.dim_c
        before = past.covered(entity, t.event_time_ms, "30d")
        return float(all(pair_hash(getattr(e, dim)) != pair_hash(getattr(t, dim)) for e in before))
    return _last_value(aggregate, t, past.last(entity, t.event_time_ms))


def _run_value(aggregate: str, t_ms: int, past: Past) -> float:
    frauds, run_ms, genuine_ms, after = past.fraud_run(t_ms)
    if aggregate == "fraud_run":
        return float(frauds)
    if not past.fraud_hours(t_ms):
        return math.nan
    if aggregate == "payments_after_fraud":
        return float(after)
    since_ms = run_ms if aggregate == "since_fraud_run" else genuine_ms
    return math.nan if since_ms is None else (t_ms - since_ms) / 1000.0


def _last_value(aggregate: str, t: Transaction, last: Transaction | None) -> float:
    if last is None:
        return math.nan
    if aggregate == "changed_b":
        return float(zlib.crc32(last.country.encode()) & 0xFFFF != zlib.crc32(t.country.encode()) & 0xFFFF)
    if aggregate == "since_last":
        return (t.event_time_ms - last.event_time_ms) / 1000.0
    assert aggregate == "speed"
    if t.latitude is None or t.longitude is None or last.latitude is None or last.longitude is None:
        return math.nan
    lat1, lat2 = math.radians(float32(last.latitude)), math.radians(float32(t.latitude))
    dlat, dlon = lat2 - lat1, math.radians(float32(t.longitude) - float32(last.longitude))
    h = math.sin(dlat / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin(dlon / 2) ** 2
    km = 2 * 6371.0 * math.asin(math.sqrt(min(h, 1.0)))
    return km / (max(t.event_time_ms - last.event_time_ms, 1000) / HOUR_MS)


def features_of(t: Transaction, past: dict[str, Past]) -> list[float]:
    """Every feature of `t`, in order, as single-precision numbers. `past` maps an entity's name to what was observed before."""
    values = []
    for f in FEATURES:
        if f.entity is None:
            values.append(float32(request_value(f.aggregate, t)))
            continue
        entity = next(e for e in ENTITIES if e.name == f.entity)
        if getattr(t, entity.field) is None:
            values.append(math.nan)
        elif f.window is None:
            values.append(float32(_lasting_value(f.aggregate, entity, t, past[f.entity])))
        elif f.aggregate in {"label_rate", "frauds"}:
            payments, frauds = past[f.entity].label_window(t.event_time_ms, f.window)
            values.append(float32(float(frauds) if f.aggregate == "frauds" else _over(float(frauds), float(payments))))
        else:
            covered = past[f.entity].covered(entity, t.event_time_ms, f.window)
            if f.aggregate in {"ratio_before", "peak", "surge"}:
                longest = past[f.entity].covered(entity, t.event_time_ms, "30d")
                values.append(float32(_compared_value(f.aggregate, t.amount_minor, covered, longest)))
                continue
            values.append(float32(_history_value(f.aggregate, entity, t.amount_minor, covered)))
    return values


# Great-circle trigonometry differs in the last bit between libraries; everything else is compared exactly.
INEXACT = frozenset(f.name for f in FEATURES if f.aggregate == "speed")


def differences(expected: Sequence[float], found: Sequence[float]) -> list[str]:
    """A line for each feature whose two values differ: equal means the same bits, or both NaN."""
    lines = []
    for f, want, got in zip(FEATURES, expected, found, strict=True):
        same = want == got or (math.isnan(want) and math.isnan(got))
        if not same and not (f.name in INEXACT and math.isclose(want, got, rel_tol=1e-5, abs_tol=1e-3)):
            lines.append(f"{f.name}: expected {want!r}, found {got!r}")
    return lines


@dataclass
class Oracle:
    """Feeds transactions in order of observation and tells what each one's features must be."""

    pasts: dict[tuple[str, str], Past] = field(default_factory=dict)

    def observe(self, t: Transaction) -> list[float]:
        """The features of `t`, which is then part of the past."""
        mine = {}
        for entity in ENTITIES:
            entity_id = getattr(t, entity.field)
            if entity_id is not None:
                mine[entity.name] = self.pasts.setdefault((entity.name, entity_id), Past())
        values = features_of(t, mine)
        for past in mine.values():
            past.events.append(t)
        return values

    def label(self, t: Transaction, change: int) -> None:
        """It becomes known that `t` was fraud (1), or that it was not after all (-1)."""
        for entity in ENTITIES:
            entity_id = getattr(t, entity.field)
            if entity.labelled and entity_id is not None:
                self.pasts.setdefault((entity.name, entity_id), Past()).labels.append(LabelChange(t.event_time_ms, change))
