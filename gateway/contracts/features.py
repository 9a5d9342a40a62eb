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
from dataclasses import dataclass, fields

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.transaction import CHANNELS, Transaction
from gateway.contracts.windows import (
    DAY_MS,
    HOUR_MS,
    NEVER,
    SETTLE_MS,
    SKETCH_ESTIMATE,
    TILE_RESOLUTIONS_MS,
    WINDOW_INDEX,
    WINDOWS,
    Aggregates,
)

Floats = npt.NDArray[np.float64]

EARTH_RADIUS_KM = 6371.0


@dataclass(frozen=True)
class Entity:
    """`field` of a transaction names it; `dim_a` and `dim_b` are the fields whose distinct values are counted for it.

    `head_events_max` is part of the definition: events at or after the boundary count only among the last that many observed.
    """

    name: str
    field: str
    dim_a: str
    dim_b: str
    head_events_max: int


ENTITIES: tuple[Entity, ...] = (
    Entity("card", "card_id", "merchant_id", "country", 64),
    Entity("customer", "customer_id", "device_id", "card_id", 64),
    Entity("merchant", "merchant_id", "card_id", "card_bin", 512),
    Entity("device", "device_id", "card_id", "ip", 64),
    Entity("ip", "ip", "card_id", "device_id", 128),
)
ENTITY_INDEX: dict[str, int] = {e.name: i for i, e in enumerate(ENTITIES)}


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


def _distinct_a(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return _distinct(a.distinct_a[w])


def _distinct_b(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    return _distinct(a.distinct_b[w])


def _since_last(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """Seconds since the entity's last event."""
    return np.where(a.last_event_time_ms == NEVER, np.nan, (r.t_ms - a.last_event_time_ms) / 1000.0)


def _speed(a: Aggregates, _w: int | slice, r: RequestColumns) -> Floats:
    """Kilometres an hour from the last event's place to this one's, along the great circle (haversine formula).

    At least a second is assumed to have passed. NaN where either place is unknown.
    """
    lat1, lat2 = np.radians(a.last_latitude), np.radians(r.latitude.astype(np.float32).astype(np.float64))
    dlat, dlon = lat2 - lat1, np.radians(r.longitude.astype(np.float32).astype(np.float64) - a.last_longitude)
    h = np.sin(dlat / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin(dlon / 2) ** 2
    km = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(h, 1.0)))
    return np.where(a.last_event_time_ms == NEVER, np.nan, km / (np.maximum(r.t_ms - a.last_event_time_ms, 1000) / HOUR_MS))


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
    "distinct_a": _distinct_a,
    "distinct_b": _distinct_b,
    "since_last": _since_last,
    "speed": _speed,
}
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
    """`entity` and `window` are None for a feature of the request. `label` names a distinct count by what it counts."""

    name: str
    entity: str | None
    aggregate: str
    window: str | None


def _of(entity: str, aggregate: str, *windows: str) -> list[Feature]:
    e = ENTITIES[ENTITY_INDEX[entity]]
    label = {
        "distinct_a": f"distinct_{e.dim_a.removesuffix('_id')}s",
        "distinct_b": f"distinct_{e.dim_b.removesuffix('_id')}s",
    }
    label["distinct_b"] = label["distinct_b"].replace("countrys", "countries")
    label["ratio"], label["zscore"] = "amount_ratio", "amount_zscore"
    called = label.get(aggregate, aggregate if aggregate in {"count", "since_last", "speed"} else f"amount_{aggregate}")
    if not windows:
        return [Feature(f"{entity}_{called}", entity, aggregate, None)]
    return [Feature(f"{entity}_{called}_{w}", entity, aggregate, w) for w in windows]


FEATURES: tuple[Feature, ...] = (
    *(Feature(name, None, name, None) for name in REQUEST_FEATURES),
    *_of("card", "count", "5m", "1h", "24h", "7d", "30d"),
    *_of("card", "sum", "1h", "24h", "7d"),
    *_of("card", "mean", "24h", "7d", "30d"),
    *_of("card", "max", "24h", "30d"),
    *_of("card", "std", "30d"),
    *_of("card", "ratio", "24h", "30d"),
    *_of("card", "zscore", "30d"),
    *_of("card", "distinct_a", "1h", "24h"),
    *_of("card", "distinct_b", "24h"),
    *_of("card", "since_last"),
    *_of("card", "speed"),
    *_of("customer", "count", "1h", "24h", "30d"),
    *_of("customer", "ratio", "30d"),
    *_of("customer", "distinct_a", "24h"),
    *_of("merchant", "count", "5m", "1h", "24h", "7d"),
    *_of("merchant", "mean", "24h", "30d"),
    *_of("merchant", "ratio", "30d"),
    *_of("merchant", "zscore", "30d"),
    *_of("merchant", "distinct_a", "5m", "1h", "24h"),
    *_of("merchant", "distinct_b", "1h"),
    *_of("device", "count", "5m", "1h", "24h"),
    *_of("device", "distinct_a", "1h", "24h"),
    *_of("device", "since_last"),
    *_of("ip", "count", "5m", "1h", "24h"),
    *_of("ip", "distinct_a", "1h", "24h"),
)
FEATURE_NAMES: tuple[str, ...] = tuple(f.name for f in FEATURES)
FEATURE_INDEX: dict[str, int] = {name: i for i, name in enumerate(FEATURE_NAMES)}
assert len(FEATURE_INDEX) == len(FEATURES), "feature names are unique"
assert all(f.aggregate in (REQUEST_FEATURES if f.entity is None else AGGREGATES) for f in FEATURES)


def _fingerprint() -> str:
    """Changes with anything that changes a feature's value or place. 16 hex digits."""
    definition = {
        "features": [(f.name, f.entity, f.aggregate, f.window) for f in FEATURES],
        "entities": [(e.name, e.field, e.dim_a, e.dim_b, e.head_events_max) for e in ENTITIES],
        "windows": [(w.name, w.length_ms, w.tail_ms) for w in WINDOWS],
        "settle_ms": SETTLE_MS,
        "tiles_ms": TILE_RESOLUTIONS_MS,
        "sketch": [float(v) for v in SKETCH_ESTIMATE],
        "semantics": 1,
    }
    return hashlib.sha256(msgspec.json.encode(definition)).hexdigest()[:16]


FINGERPRINT = _fingerprint()


_ALL_WINDOWS = slice(None)
# What `feature_matrix` computes once for all entities and windows, and where each feature then stands.
_WINDOWED: tuple[str, ...] = tuple(dict.fromkeys(f.aggregate for f in FEATURES if f.window is not None))
_LASTING: tuple[str, ...] = tuple(dict.fromkeys(f.aggregate for f in FEATURES if f.entity is not None and f.window is None))
_ENTITY_COLUMNS = np.array([i for i, f in enumerate(FEATURES) if f.entity is not None])
_OF_ENTITY = np.array([ENTITY_INDEX[f.entity] for f in FEATURES if f.entity is not None])
_ROWS = np.array(
    [
        len(_WINDOWED) * len(WINDOWS) + _LASTING.index(f.aggregate)
        if f.window is None
        else _WINDOWED.index(f.aggregate) * len(WINDOWS) + WINDOW_INDEX[f.window]
        for f in FEATURES
        if f.entity is not None
    ]
)


def feature_matrix(request: RequestColumns, aggregates: Aggregates, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The model's input, (batch, len(FEATURES)), float32.

    `aggregates` has an owner for each transaction and entity, by transaction, then entity; `known` is (batch, len(ENTITIES)), False
    where the transaction doesn't name the entity or its state couldn't be read: those features are NaN.
    """
    batch, entities = known.shape
    each = RequestColumns(*(np.repeat(getattr(request, f.name), entities) for f in fields(RequestColumns)))
    values = np.empty((len(_WINDOWED) * len(WINDOWS) + len(_LASTING), batch * entities))
    for i, name in enumerate(_WINDOWED):
        values[i * len(WINDOWS) : (i + 1) * len(WINDOWS)] = AGGREGATES[name](aggregates, _ALL_WINDOWS, each)
    for i, name in enumerate(_LASTING):
        values[len(_WINDOWED) * len(WINDOWS) + i] = AGGREGATES[name](aggregates, _ALL_WINDOWS, each)
    values[:, ~known.reshape(-1)] = np.nan
    out = np.empty((batch, len(FEATURES)), np.float32)
    out[:, _ENTITY_COLUMNS] = values.reshape(-1, batch, entities)[_ROWS, :, _OF_ENTITY].T
    for i, f in enumerate(FEATURES):
        if f.entity is None:
            out[:, i] = REQUEST_FEATURES[f.aggregate](request)
    return out
