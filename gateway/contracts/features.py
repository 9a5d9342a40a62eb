"""The features, declared once, in the order the model sees them.

A feature is (entity, aggregate, window), or is read from the request alone. The gateway, the training set, the parity check and
the slow oracle in tests/ all follow this list; its fingerprint stands in each model and each receipt. Adding a feature is one line
in FEATURES; an aggregate of a new kind is one function in AGGREGATES.

Unknown is NaN: a mean of no events, the speed of a card without a last place, everything of an entity that isn't named.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.layout import dim_hash
from gateway.contracts.transaction import CHANNELS, Transaction
from gateway.contracts.windows import (
    DAY_MS,
    HOUR_MS,
    LABEL_WINDOW_INDEX,
    LABEL_WINDOWS,
    LAST_MS_MAX,
    NEVER,
    PAIR_WINDOW,
    SEEN_HASH_MASK,
    SETTLE_MS,
    SKETCH_ESTIMATE,
    SKETCHED_WINDOWS,
    TILE_RESOLUTIONS_MS,
    WINDOW_INDEX,
    WINDOWS,
    Aggregates,
)

Floats = npt.NDArray[np.float64]

EARTH_RADIUS_KM = 6371.0


@dataclass(frozen=True)
class Entity:
    """`field` of a transaction names it; `dim_a`, `dim_b` and `dim_c` are the fields whose distinct values are counted for it.

    `head_events_max` is part of the definition: events at or after the boundary count only among the last that many observed.
    `pairs`: it remembers which values of dim_a and dim_c it was seen with. `labelled`: frauds among its payments are counted.
    """

    name: str
    field: str
    dim_a: str
    dim_b: str
    dim_c: str
    head_events_max: int
    pairs: bool = False
    labelled: bool = False

    @property
    def dims(self) -> tuple[str, str, str]:
        return self.dim_a, self.dim_b, self.dim_c


ENTITIES: tuple[Entity, ...] = (
    Entity("card", "card_id", "merchant_id", "country", "device_id", 64, pairs=True),
    Entity("customer", "customer_id", "device_id", "card_id", "merchant_id", 64, labelled=True),
    Entity("merchant", "merchant_id", "card_id", "card_bin", "device_id", 128, labelled=True),
    Entity("device", "device_id", "card_id", "ip", "merchant_id", 64),
    Entity("ip", "ip", "card_id", "device_id", "merchant_id", 128),
)
ENTITY_INDEX: dict[str, int] = {e.name: i for i, e in enumerate(ENTITIES)}
LABELLED: tuple[int, ...] = tuple(i for i, e in enumerate(ENTITIES) if e.labelled)


@dataclass(frozen=True)
class RequestColumns:
    """What the request itself says, one value a transaction, shape (batch,)."""

    t_ms: npt.NDArray[np.int64]
    amount_minor: npt.NDArray[np.int64]
    channel: Floats
    mcc: Floats
    cross_border: Floats
    latitude: Floats
    longitude: Floats
    # layout.dim_hash of the country
    country: Floats


def request_columns(batch: list[Transaction]) -> RequestColumns:
    """Columns of a batch, in its order."""
    return RequestColumns(
        t_ms=np.array([t.event_time_ms for t in batch], np.int64),
        amount_minor=np.array([t.amount_minor for t in batch], np.int64),
        channel=np.array([CHANNELS.index(t.channel) for t in batch], np.float64),
        mcc=np.array([int(t.mcc) for t in batch], np.float64),
        cross_border=np.array(
            [math.nan if t.card_country is None else float(t.card_country != t.country) for t in batch], np.float64
        ),
        latitude=np.array([math.nan if t.latitude is None else t.latitude for t in batch], np.float64),
        longitude=np.array([math.nan if t.longitude is None else t.longitude for t in batch], np.float64),
        country=np.array([dim_hash(t.country) for t in batch], np.float64),
    )


# Aggregates of some owners, for each of which `r` has a row. w is the index of a window: shape (owners,), or all: (windows, owners).


def _count(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    out: Floats = a.count[w].astype(np.float64)
    return out


def _sum(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    out: Floats = a.total[w].astype(np.float64)
    return out


def _mean(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return _divide(a.total[w].astype(np.float64), a.count[w].astype(np.float64))


def _max(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return np.where(a.largest[w] < 0, np.nan, a.largest[w].astype(np.float64))


def _std(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    """Population standard deviation; NaN under two events. From integer sums, so order doesn't matter."""
    n = a.count[w].astype(np.float64)
    mean = _mean(a, w, r)
    variance = np.maximum(_divide(a.squares[w].astype(np.float64), n) - mean * mean, 0.0)
    return np.where(n < 2, np.nan, np.sqrt(variance))


def _ratio(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    """The amount over the entity's mean amount."""
    return _divide(r.amount_minor.astype(np.float64), _mean(a, w, r))


def _zscore(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    """(amount - mean) / standard deviation; NaN where the deviation is unknown or 0."""
    return _divide(r.amount_minor.astype(np.float64) - _mean(a, w, r), _std(a, w, r))


def _ratio_before(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    """The amount over the mean of the longest window without this one: what was usual before the newest payments."""
    total, count = a.total[-1] - a.total[w], a.count[-1] - a.count[w]
    return _divide(r.amount_minor.astype(np.float64), _divide(total.astype(np.float64), count.astype(np.float64)))


def _peak(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    """The largest amount over the mean of the longest window."""
    return _divide(_max(a, w, r), _mean(a, -1, r))


def _surge(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    """The mean amount over that of the longest window."""
    return _divide(_mean(a, w, r), _mean(a, -1, r))


def _distinct_a(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return _distinct(a.distinct_a[w])


def _distinct_b(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return _distinct(a.distinct_b[w])


def _distinct_c(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return _distinct(a.distinct_c[w])


def _label_rate(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    """Share of the payments that were labelled fraud, of those old enough to be labelled."""
    return _divide(a.label_frauds[w].astype(np.float64), a.label_count[w].astype(np.float64))


def _label_count(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    """Payments old enough to be labelled."""
    out: Floats = a.label_count[w].astype(np.float64)
    return out


def _frauds(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    out: Floats = a.label_frauds[w].astype(np.float64)
    return out


def _since_first_fraud(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """Seconds since the first hour with a known fraud in the longest label window."""
    return np.where(a.first_fraud_ms == NEVER, np.nan, (r.t_ms - a.first_fraud_ms) / 1000.0)


def _since_last_fraud(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    return np.where(a.last_fraud_ms == NEVER, np.nan, (r.t_ms - a.last_fraud_ms) / 1000.0)


def _rate_since_fraud(a: Aggregates, _w: int | slice, _: RequestColumns) -> Floats:
    """Share of frauds since the day of the first, in the longest label window: of a terminal that was taken over, near 1."""
    return _divide(a.label_frauds[-1].astype(np.float64), a.payments_since_fraud.astype(np.float64))


def _fraud_run(a: Aggregates, _w: int | slice, _: RequestColumns) -> Floats:
    """Frauds since the last whole day with a payment that is not known to be fraud, in the longest label window."""
    out: Floats = a.fraud_run.astype(np.float64)
    return out


def _since_fraud_run(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """Seconds since the midnight at which the first day of those frauds began."""
    return np.where(a.run_day_ms == NEVER, np.nan, (r.t_ms - a.run_day_ms) / 1000.0)


def _since_genuine(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """Seconds since the midnight at which that last whole day began: what was taken over was so at some time after it."""
    return np.where(a.genuine_day_ms == NEVER, np.nan, (r.t_ms - a.genuine_day_ms) / 1000.0)


def _payments_after_fraud(a: Aggregates, _w: int | slice, _: RequestColumns) -> Floats:
    """Payments of the whole days after the last fraud's: none of them is known to be one."""
    return np.where(a.first_fraud_ms == NEVER, np.nan, a.payments_after_fraud.astype(np.float64))


def _new_a(a: Aggregates, _w: int | slice, _: RequestColumns) -> Floats:
    """1 when the entity was not seen with this value of dim_a in PAIR_WINDOW."""
    return a.new_a.astype(np.float64)


def _new_c(a: Aggregates, _w: int | slice, _: RequestColumns) -> Floats:
    return a.new_c.astype(np.float64)


def _changed_b(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """1 when the entity's last event was in another country."""
    return np.where(a.last_event_time_ms == NEVER, np.nan, (a.last_dim_b != r.country).astype(np.float64))


def _since_last(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """Seconds since the entity's last event."""
    return np.where(a.last_event_time_ms == NEVER, np.nan, (r.t_ms - a.last_event_time_ms) / 1000.0)


def _speed(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    speed = speed_kmh(a.last_event_time_ms, a.last_latitude, a.last_longitude, r.t_ms, r.latitude, r.longitude)
    return np.where(a.last_event_time_ms == NEVER, np.nan, speed)


def speed_kmh(
    last_ms: npt.NDArray[Any], last_latitude: Floats, last_longitude: Floats, t_ms: Any, lat: Floats, lon: Floats
) -> Floats:
    """Kilometres an hour from the last event's place to this one's, along the great circle (haversine formula).

    At least a second is assumed to have passed. NaN where either place is unknown.
    """
    lat1, lat2 = np.radians(last_latitude), np.radians(lat.astype(np.float32).astype(np.float64))
    dlat, dlon = lat2 - lat1, np.radians(lon.astype(np.float32).astype(np.float64) - last_longitude)
    h = np.sin(dlat / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin(dlon / 2) ** 2
    km = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(h, 1.0)))
    out: Floats = km / (np.maximum(t_ms - last_ms, 1000) / HOUR_MS)
    return out


def _distinct(bitmap: npt.NDArray[np.uint64]) -> Floats:
    return SKETCH_ESTIMATE[np.bitwise_count(bitmap)]


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, NaN where b is 0 or either is NaN."""
    out = np.full(np.broadcast_shapes(a.shape, b.shape), np.nan)
    np.divide(a, b, out=out, where=b != 0)
    return out


AGGREGATES: dict[str, Callable[[Aggregates, int | slice, RequestColumns], Floats]] = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "max": _max,
    "std": _std,
    "ratio": _ratio,
    "zscore": _zscore,
    "ratio_before": _ratio_before,
    "peak": _peak,
    "surge": _surge,
    "distinct_a": _distinct_a,
    "distinct_b": _distinct_b,
    "distinct_c": _distinct_c,
    "label_rate": _label_rate,
    "label_count": _label_count,
    "frauds": _frauds,
    "since_first_fraud": _since_first_fraud,
    "since_last_fraud": _since_last_fraud,
    "rate_since_fraud": _rate_since_fraud,
    "fraud_run": _fraud_run,
    "since_fraud_run": _since_fraud_run,
    "since_genuine": _since_genuine,
    "payments_after_fraud": _payments_after_fraud,
    "new_a": _new_a,
    "new_c": _new_c,
    "changed_b": _changed_b,
    "since_last": _since_last,
    "speed": _speed,
}
# Of the longest label window alone; all but the first are unknown without a fraud in it.
FRAUD_RUN_AGGREGATES = frozenset({"fraud_run", "since_fraud_run", "since_genuine", "payments_after_fraud"})
LABEL_AGGREGATES = FRAUD_RUN_AGGREGATES | {
    *("label_rate", "label_count", "frauds", "since_first_fraud", "since_last_fraud", "rate_since_fraud"),
}
# Compared with the longest window.
COMPARED_AGGREGATES = frozenset({"ratio_before", "peak", "surge"})
assert all(w.length_ms < WINDOWS[-1].length_ms for w in WINDOWS[:-1]), "the last one holds all others"
SKETCH_AGGREGATES = frozenset({"distinct_a", "distinct_b", "distinct_c"})
PAIR_AGGREGATES = frozenset({"new_a", "new_c"})
REQUEST_FEATURES: dict[str, Callable[[RequestColumns], Floats]] = {
    "amount_minor": lambda r: r.amount_minor.astype(np.float64),
    "hour": lambda r: (r.t_ms % DAY_MS // HOUR_MS).astype(np.float64),
    # 1970-01-01 was a Thursday: 0 is Monday.
    "weekday": lambda r: ((r.t_ms // DAY_MS + 3) % 7).astype(np.float64),
    "is_night": lambda r: (r.t_ms % DAY_MS < 7 * HOUR_MS).astype(np.float64),
    "is_weekend": lambda r: ((r.t_ms // DAY_MS + 3) % 7 >= 5).astype(np.float64),
    "channel": lambda r: r.channel,
    "mcc": lambda r: r.mcc,
    "cross_border": lambda r: r.cross_border,
}


@dataclass(frozen=True)
class Feature:
    """`entity` and `window` are None for a feature of the request. The aggregate says of which windows the name `window` is."""

    name: str
    entity: str | None
    aggregate: str
    window: str | None

    @property
    def window_index(self) -> int | None:
        """Its place among WINDOWS, or LABEL_WINDOWS for an aggregate of labels; None without a window."""
        if self.window is None:
            return None
        return (LABEL_WINDOW_INDEX if self.aggregate in LABEL_AGGREGATES else WINDOW_INDEX)[self.window]


def _plural(dim: str) -> str:
    return {"country": "countries", "card_bin": "bins"}.get(dim, f"{dim.removesuffix('_id')}s")


def _of(entity: str, aggregate: str, *windows: str) -> list[Feature]:
    e = ENTITIES[ENTITY_INDEX[entity]]
    called = {
        "count": "count",
        "distinct_a": f"distinct_{_plural(e.dim_a)}",
        "distinct_b": f"distinct_{_plural(e.dim_b)}",
        "distinct_c": f"distinct_{_plural(e.dim_c)}",
        "ratio": "amount_ratio",
        "zscore": "amount_zscore",
        "label_rate": "fraud_rate",
        "frauds": "frauds",
        "since_first_fraud": "since_first_fraud",
        "since_last_fraud": "since_last_fraud",
        "rate_since_fraud": "fraud_rate_since_first",
        **{name: name for name in FRAUD_RUN_AGGREGATES},
        "new_a": f"new_{e.dim_a.removesuffix('_id')}",
        "new_c": f"new_{e.dim_c.removesuffix('_id')}",
        "changed_b": f"{e.dim_b}_changed",
        "since_last": "since_last",
        "speed": "speed",
    }.get(aggregate, f"amount_{aggregate}")
    if not windows:
        return [Feature(f"{entity}_{called}", entity, aggregate, None)]
    return [Feature(f"{entity}_{called}_{w}", entity, aggregate, w) for w in windows]


FEATURES: tuple[Feature, ...] = (
    *(Feature(name, None, name, None) for name in REQUEST_FEATURES),
    *_of("card", "count", "5m", "1h", "24h", "7d", "30d"),
    *_of("card", "sum", "1h", "24h", "7d", "30d"),
    *_of("card", "mean", "24h", "7d", "30d"),
    *_of("card", "max", "24h", "30d"),
    *_of("card", "std", "7d", "30d"),
    *_of("card", "ratio", "24h", "30d"),
    *_of("card", "zscore", "7d", "30d"),
    *_of("card", "ratio_before", "7d"),
    *_of("card", "peak", "7d"),
    *_of("card", "surge", "7d"),
    *_of("card", "distinct_a", "1h", "24h"),
    *_of("card", "distinct_b", "24h"),
    *_of("card", "distinct_c", "24h"),
    *_of("card", "new_a"),
    *_of("card", "new_c"),
    *_of("card", "changed_b"),
    *_of("card", "since_last"),
    *_of("card", "speed"),
    *_of("customer", "count", "1h", "24h", "7d", "30d"),
    *_of("customer", "sum", "24h", "30d"),
    *_of("customer", "ratio", "7d", "30d"),
    *_of("customer", "zscore", "30d"),
    *_of("customer", "distinct_a", "24h"),
    *_of("customer", "distinct_b", "24h"),
    *_of("customer", "since_last"),
    *_of("customer", "label_rate", "7d", "30d"),
    *_of("merchant", "count", "5m", "1h", "24h", "7d", "30d"),
    *_of("merchant", "mean", "24h", "30d"),
    *_of("merchant", "ratio", "30d"),
    *_of("merchant", "zscore", "30d"),
    *_of("merchant", "distinct_a", "5m", "1h", "24h"),
    *_of("merchant", "distinct_b", "1h"),
    *_of("merchant", "label_rate", "1d", "3d", "7d", "14d", "30d"),
    *_of("merchant", "frauds", "1d", "3d", "7d", "14d", "30d"),
    *_of("merchant", "since_first_fraud"),
    *_of("merchant", "since_last_fraud"),
    *_of("merchant", "rate_since_fraud"),
    *_of("merchant", "fraud_run"),
    *_of("merchant", "since_fraud_run"),
    *_of("merchant", "since_genuine"),
    *_of("merchant", "payments_after_fraud"),
    *_of("device", "count", "5m", "1h", "24h", "7d"),
    *_of("device", "distinct_a", "1h", "24h"),
    *_of("device", "distinct_b", "24h"),
    *_of("device", "since_last"),
    *_of("ip", "count", "5m", "1h", "24h"),
    *_of("ip", "distinct_a", "1h", "24h"),
    *_of("ip", "distinct_b", "24h"),
)
FEATURE_NAMES: tuple[str, ...] = tuple(f.name for f in FEATURES)
FEATURE_INDEX: dict[str, int] = {name: i for i, name in enumerate(FEATURE_NAMES)}
assert len(FEATURE_INDEX) == len(FEATURES), "feature names are unique"
assert all(f.aggregate in (REQUEST_FEATURES if f.entity is None else AGGREGATES) for f in FEATURES)
assert all(f.window in SKETCHED_WINDOWS for f in FEATURES if f.aggregate in SKETCH_AGGREGATES)
assert all(ENTITIES[ENTITY_INDEX[f.entity]].pairs for f in FEATURES if f.entity and f.aggregate in PAIR_AGGREGATES)
assert all(ENTITIES[ENTITY_INDEX[f.entity]].labelled for f in FEATURES if f.entity and f.aggregate in LABEL_AGGREGATES)
assert all(ENTITIES[ENTITY_INDEX[f.entity]].dim_b == "country" for f in FEATURES if f.entity and f.aggregate == "changed_b")


def _fingerprint() -> str:
    """Changes with anything that changes a feature's value or place. 16 hex digits."""
    definition = {
        "features": [(f.name, f.entity, f.aggregate, f.window) for f in FEATURES],
        "entities": [(e.name, e.field, *e.dims, e.head_events_max, e.pairs, e.labelled) for e in ENTITIES],
        "windows": [(w.name, w.length_ms, w.tail_ms, w.delay_ms) for w in (*WINDOWS, *LABEL_WINDOWS)],
        "last_ms": LAST_MS_MAX,
        "pairs": [PAIR_WINDOW.name, SEEN_HASH_MASK],
        "settle_ms": SETTLE_MS,
        "tiles_ms": TILE_RESOLUTIONS_MS,
        "sketch": [float(v) for v in SKETCH_ESTIMATE],
        "semantics": 4,
    }
    return hashlib.sha256(msgspec.json.encode(definition)).hexdigest()[:16]


FINGERPRINT = _fingerprint()
