"""A payment as it might have been: one thing about it changed, and whatever follows from that with it.

Read by gateway/explanations/counterfactual.py. A lever is something that can be changed; applying it keeps the features feasible together:
another amount has another ratio and z-score to the same past, fewer payments in an hour are fewer in a day too. What can't be told from the
row stays as it was: other entities, and the past at another hour.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES, FEATURE_INDEX, FEATURES, FRAUD_RUN_AGGREGATES
from gateway.contracts.transaction import AMOUNT_MINOR_MAX, AMOUNT_MINOR_MIN, CHANNELS, Transaction
from gateway.contracts.windows import DAY_MS, HOUR_MS, SKETCH_ESTIMATE, WINDOWS

Row = npt.NDArray[np.float32]
# By column, the values at which a tree or a rule changes its mind.
Thresholds = dict[int, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """A payment and the features (features,) that its score is made of."""

    transaction: Transaction
    row: Row

    def of(self, name: str) -> float:
        return float(self.row[FEATURE_INDEX[name]])

    def with_features(self, values: dict[str, float], **fields: object) -> Case:
        """The same with other features, and other fields of the transaction."""
        row = self.row.copy()
        for name, value in values.items():
            row[FEATURE_INDEX[name]] = value
        return Case(msgspec.structs.replace(self.transaction, **fields) if fields else self.transaction, row)


# A number doubled this often is as much as the step from the amount to a card's past or so.
DISTANCE_OF_EFFORT = 4


class Lever(ABC):
    """Something that can be changed. `name` is the feature that is set; `effort` how hard it is, or how little the payer's own choice."""

    def __init__(self, name: str, effort: float) -> None:
        self.name = name
        self.effort = effort

    @abstractmethod
    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        """What is worth trying, in no order."""

    @abstractmethod
    def apply(self, case: Case, value: float) -> Case | None:
        """The case with this value, or None when nobody can say what follows from it."""

    def effort_of(self, before: float, after: float) -> float:
        """What a change is chosen by. The kind of change counts for more than how far it goes."""
        return self.effort + self.distance(before, after) / DISTANCE_OF_EFFORT

    def distance(self, before: float, after: float) -> float:
        """How far apart two values are, for choosing the nearer: about 1 between a number and its double."""
        if math.isnan(before) or math.isnan(after):
            return 1.0
        return abs(math.log2((abs(after) + 1) / (abs(before) + 1)))


def _window_features(entity: str, aggregate: str) -> dict[int, str]:
    """The features of an entity's aggregate, by the place of their window among WINDOWS."""
    return {
        f.window_index: f.name for f in FEATURES if f.entity == entity and f.aggregate == aggregate and f.window_index is not None
    }


@dataclass(frozen=True)
class _Usual:
    """What an amount is compared with: an entity's payments of one window. Names of features, None where there is none."""

    ratio: str | None
    zscore: str | None
    mean: str | None
    std: str | None

    @staticmethod
    def all() -> list[_Usual]:
        found = []
        for entity in (e.name for e in ENTITIES):
            ratio, zscore, mean, std = (_window_features(entity, a) for a in ("ratio", "zscore", "mean", "std"))
            found += [_Usual(ratio.get(w), zscore.get(w), mean.get(w), std.get(w)) for w in sorted(set(ratio) | set(zscore))]
            found += [_Usual(name, None, None, None) for name in _window_features(entity, "ratio_before").values()]
        return found

    def mean_of(self, case: Case) -> float:
        """The mean amount, from its own feature or the ratio; NaN when neither tells."""
        if self.mean is not None and not math.isnan(mean := case.of(self.mean)):
            return mean
        ratio = math.nan if self.ratio is None else case.of(self.ratio)
        return case.of("amount_minor") / ratio if ratio > 0 else math.nan

    def std_of(self, case: Case, mean: float) -> float:
        if self.std is not None and not math.isnan(std := case.of(self.std)):
            return std
        z = math.nan if self.zscore is None else case.of(self.zscore)
        return (case.of("amount_minor") - mean) / z if z != 0 else math.nan


_USUAL = _Usual.all()
AMOUNTS_MAX = 400
VALUES_MAX = 64


class Amount(Lever):
    """The amount, with every ratio and z-score that compares it with a past."""

    def __init__(self) -> None:
        super().__init__("amount_minor", 1.0)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        edges: list[float] = list(thresholds.get(FEATURE_INDEX["amount_minor"], []))
        for usual in _USUAL:
            mean = usual.mean_of(case)
            std = usual.std_of(case, mean)
            if usual.ratio is not None and mean > 0:
                edges += (mean * thresholds.get(FEATURE_INDEX[usual.ratio], np.empty(0))).tolist()
            if usual.zscore is not None and std > 0 and not math.isnan(mean):
                edges += (mean + std * thresholds.get(FEATURE_INDEX[usual.zscore], np.empty(0))).tolist()
        now = case.transaction.amount_minor
        near = {a for edge in edges for a in (math.floor(edge) - 1, math.floor(edge), math.ceil(edge), math.ceil(edge) + 1)}
        possible = [float(a) for a in sorted(near) if max(AMOUNT_MINOR_MIN, 1) <= a <= AMOUNT_MINOR_MAX and a != now]
        return _thinned(possible, AMOUNTS_MAX)

    def apply(self, case: Case, value: float) -> Case | None:
        values = {"amount_minor": value}
        for usual in _USUAL:
            mean = usual.mean_of(case)
            if usual.ratio is not None and not math.isnan(case.of(usual.ratio)):
                if math.isnan(mean):
                    return None
                values[usual.ratio] = value / mean
            if usual.zscore is not None and not math.isnan(case.of(usual.zscore)):
                std = usual.std_of(case, mean)
                if math.isnan(mean) or not std > 0:
                    return None
                values[usual.zscore] = (value - mean) / std
        return case.with_features(values, amount_minor=int(value))


class Hour(Lever):
    """The hour of the day, UTC, all else equal."""

    def __init__(self) -> None:
        super().__init__("hour", 1.5)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return [float(h) for h in range(24) if h != case.of("hour")]

    def apply(self, case: Case, value: float) -> Case | None:
        t_ms = case.transaction.event_time_ms
        at_ms = t_ms + (int(value) - t_ms % DAY_MS // HOUR_MS) * HOUR_MS
        return case.with_features({"hour": value, "is_night": float(value < 7)}, event_time_ms=at_ms)

    def distance(self, before: float, after: float) -> float:
        apart = abs(after - before)
        return min(apart, 24 - apart) / 6


class Weekday(Lever):
    """The day of the week, 0 is Monday, all else equal."""

    def __init__(self) -> None:
        super().__init__("weekday", 1.5)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return [float(d) for d in range(7) if d != case.of("weekday")]

    def apply(self, case: Case, value: float) -> Case | None:
        at_ms = case.transaction.event_time_ms + int(value - case.of("weekday")) * DAY_MS
        return case.with_features({"weekday": value, "is_weekend": float(value >= 5)}, event_time_ms=at_ms)

    def distance(self, before: float, after: float) -> float:
        apart = abs(after - before)
        return min(apart, 7 - apart) / 3


class Channel(Lever):
    """How the card was presented."""

    def __init__(self) -> None:
        super().__init__("channel", 1.5)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return [float(c) for c in range(len(CHANNELS)) if c != case.of("channel")]

    def apply(self, case: Case, value: float) -> Case | None:
        return case.with_features({"channel": value}, channel=CHANNELS[int(value)])


class Domestic(Lever):
    """A card of the merchant's own country."""

    def __init__(self) -> None:
        super().__init__("cross_border", 2.0)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return [] if case.of("cross_border") == 0 else [0.0]

    def apply(self, case: Case, value: float) -> Case | None:
        return case.with_features({"cross_border": value}, card_country=case.transaction.country)


class Known(Lever):
    """A merchant or device that the card was seen with before, or its last country again. Only of a card with a past."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 2.0)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return [0.0] if case.of(self.name) == 1 and case.of("card_count_30d") > 0 else []

    def apply(self, case: Case, value: float) -> Case | None:
        return case.with_features({self.name: value})


class Speed(Lever):
    """A last place nearer by, km/h; the time since stays."""

    def __init__(self) -> None:
        super().__init__("card_speed", 2.0)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return _below(thresholds, self.name, case.of(self.name), least=0.0)

    def apply(self, case: Case, value: float) -> Case | None:
        return case.with_features({self.name: value})


class Count(Lever):
    """How many payments an entity had in a window. Fewer: the oldest of the window are away first. More: older ones of the same kind."""

    def __init__(self, entity: str, window: int, effort: float) -> None:
        self.past = Past(entity)
        self.window = window
        super().__init__(self.past.count[window], effort)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        now = case.of(self.name)
        # Of an entity that never paid nobody knows how it would have.
        return [v for v in _whole(thresholds, self.name) if v >= 0 and v != now] if now > 0 else []

    def apply(self, case: Case, value: float) -> Case | None:
        return case.with_features(self.past.with_count(case, self.window, value))


class Distinct(Lever):
    """How many different values an entity was seen with in a window; fewer only."""

    def __init__(self, entity: str, aggregate: str, window: int, effort: float) -> None:
        self._windows = _window_features(entity, aggregate)
        self._window = window
        super().__init__(self._windows[window], effort)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        now = case.of(self.name)
        return [v for v in _whole(thresholds, self.name) if 1 <= v < now]

    def apply(self, case: Case, value: float) -> Case | None:
        shorter = {name: min(case.of(name), value) for w, name in self._windows.items() if w < self._window}
        return case.with_features({**shorter, self.name: value})


class SinceLast(Lever):
    """A longer time since an entity's last payment, seconds: the windows that fit into it are empty then."""

    def __init__(self, entity: str, effort: float) -> None:
        self.past = Past(entity)
        assert self.past.since_last is not None
        super().__init__(self.past.since_last, effort)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        now = case.of(self.name)
        edges = thresholds.get(FEATURE_INDEX[self.name], np.empty(0))
        longest_s = max(WINDOWS[w].length_ms for w in self.past.count) / 1000
        return _thinned([float(np.float32(v)) for v in edges if now < v < longest_s], VALUES_MAX)

    def apply(self, case: Case, value: float) -> Case | None:
        values = self.past.without_newer(case, value)
        return case.with_features({**values, self.name: value, **self.past.speed_after(case, value)})


_OF_FRAUDS = (FRAUD_RUN_AGGREGATES - {"fraud_run"}) | {"since_first_fraud", "since_last_fraud", "rate_since_fraud"}


class NoFrauds(Lever):
    """An entity without reported frauds. The last to be offered: nobody who pays can change it."""

    def __init__(self, entity: str) -> None:
        counted = [f.name for f in FEATURES if f.entity == entity and f.aggregate in ("label_rate", "frauds")]
        self._features = [*counted, *(f.name for f in FEATURES if f.entity == entity and f.aggregate == "fraud_run")]
        # Known only of an entity with frauds.
        self._of_frauds = [f.name for f in FEATURES if f.entity == entity and f.aggregate in _OF_FRAUDS]
        super().__init__(counted[-1], 5.0)

    def values(self, case: Case, thresholds: Thresholds) -> list[float]:
        return [0.0] if any(case.of(name) > 0 for name in (*self._features, *self._of_frauds)) else []

    def apply(self, case: Case, value: float) -> Case | None:
        zero = {name: value for name in self._features if case.of(name) > 0}
        return case.with_features(zero | dict.fromkeys(self._of_frauds, math.nan))


class Past:
    """An entity's features that follow from how many payments it had."""

    def __init__(self, entity: str) -> None:
        self.count = _window_features(entity, "count")
        self._sum = _window_features(entity, "sum")
        self._of_some = [_window_features(entity, a) for a in ("mean", "max", "ratio", "peak", "surge")]
        self._of_two = [_window_features(entity, a) for a in ("std", "zscore")]
        self._before = _window_features(entity, "ratio_before")
        self._distinct = [_window_features(entity, a) for a in ("distinct_a", "distinct_b", "distinct_c")]
        named = {f.aggregate: f.name for f in FEATURES if f.entity == entity and f.window is None}
        self.since_last = named.get("since_last")
        self._speed = named.get("speed")
        self._changed = named.get("changed_b")
        self._new = [named[a] for a in ("new_a", "new_c") if a in named]
        for each in (self._sum, *self._of_some, *self._of_two, self._before, *self._distinct):
            assert set(each) <= set(self.count), "what is said of a window follows from its count"

    def with_count(self, case: Case, window: int, count: float) -> dict[str, float]:
        """The features that change when the entity had `count` payments in `window`, and those of the usual size."""
        before = {w: n for w, name in self.count.items() if not math.isnan(n := case.of(name))}
        if window not in before:
            return {}
        less = before[window] - count
        after = {w: max(n - less, 0.0) if w >= window else min(n, count) if less > 0 else n for w, n in before.items()}
        return self._counted(case, before, after) | self._last(case, after)

    def without_newer(self, case: Case, since_s: float) -> dict[str, float]:
        """The features that change when the last payment was `since_s` seconds ago: newer ones lie before that now."""
        before = {w: n for w, name in self.count.items() if not math.isnan(n := case.of(name))}
        after = {w: 0.0 if WINDOWS[w].length_ms <= since_s * 1000 else n for w, n in before.items()}
        return self._counted(case, before, after)

    def _counted(self, case: Case, before: dict[int, float], after: dict[int, float]) -> dict[str, float]:
        """What is said of the windows whose count changes, of payments of the same size as before."""
        values: dict[str, float] = {}
        for w, n in after.items():
            if n == before[w]:
                continue
            values[self.count[w]] = n
            if w in self._sum:
                values[self._sum[w]] = case.of(self._sum[w]) * n / before[w] if before[w] > 0 else 0.0
            values |= {of[w]: math.nan for of in self._of_some if w in of and n == 0}
            values |= {of[w]: math.nan for of in self._of_two if w in of and n < 2}
            values |= {of[w]: min(case.of(of[w]), _estimate(n)) for of in self._distinct if w in of}
        # What lies in the longest window alone: of the same size as before, while there is any.
        longest = max(after, default=0)
        values |= {name: math.nan for w, name in self._before.items() if w in after and after[w] == after[longest]}
        return values

    def _last(self, case: Case, after: dict[int, float]) -> dict[str, float]:
        """The last payment lies before the windows that are empty now."""
        empty = [w for w, n in after.items() if n == 0]
        if not empty or self.since_last is None or math.isnan(case.of(self.since_last)):
            return {}
        if len(empty) == len(after):
            unknown = [n for n in (self.since_last, self._speed, self._changed) if n is not None]
            return {**dict.fromkeys(unknown, math.nan), **dict.fromkeys(self._new, 1.0)}
        longest = WINDOWS[max(empty)]
        since = max(case.of(self.since_last), (longest.length_ms + longest.tail_ms) / 1000)
        return {self.since_last: since, **self.speed_after(case, since)}

    def speed_after(self, case: Case, since_s: float) -> dict[str, float]:
        """The same way in another time, of which at least a second counts."""
        if self._speed is None or self.since_last is None or math.isnan(case.of(self._speed)):
            return {}
        return {self._speed: case.of(self._speed) * max(case.of(self.since_last), 1.0) / max(since_s, 1.0)}


def _estimate(count: float) -> float:
    """The most different values that so many payments can be seen with."""
    return float(SKETCH_ESTIMATE[min(int(count), len(SKETCH_ESTIMATE) - 1)])


def _whole(thresholds: Thresholds, name: str) -> list[float]:
    """Whole numbers on both sides of each threshold."""
    edges = thresholds.get(FEATURE_INDEX[name], np.empty(0))
    return _thinned(sorted({float(v) for e in edges for v in (math.ceil(e) - 1, math.floor(e), math.ceil(e))}), VALUES_MAX)


def _below(thresholds: Thresholds, name: str, now: float, *, least: float) -> list[float]:
    """The float32 just below each threshold that lies below `now`, each threshold itself, and `least`."""
    edges = np.float32(thresholds.get(FEATURE_INDEX[name], np.empty(0)))
    near = {float(v) for v in np.concatenate([edges, np.nextafter(edges, np.float32(-np.inf))])} | {least}
    return _thinned(sorted(v for v in near if least <= v < now), VALUES_MAX)


def _thinned(values: Iterable[float], most: int) -> list[float]:
    """At most `most` of them, evenly over the list, first and last included."""
    found = list(values)
    if len(found) <= most:
        return found
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, most).astype(int)).tolist()]


# How hard it is for each entity to have had another past: the cardholder's own is nearer at hand than a merchant's.
_EFFORT = {"card": 2.5, "customer": 2.5, "device": 3.0, "ip": 3.0, "merchant": 4.0}


def _levers() -> tuple[Lever, ...]:
    found: list[Lever] = [Amount(), Hour(), Weekday(), Channel(), Domestic()]
    found += [Known(name) for name in ("card_new_merchant", "card_new_device", "card_country_changed")]
    found.append(Speed())
    for entity, effort in _EFFORT.items():
        found += [Count(entity, w, effort) for w in _window_features(entity, "count")]
        for aggregate in ("distinct_a", "distinct_b", "distinct_c"):
            found += [Distinct(entity, aggregate, w, effort) for w in _window_features(entity, aggregate)]
        if any(f.entity == entity and f.aggregate == "since_last" for f in FEATURES):
            found.append(SinceLast(entity, effort))
    found += [NoFrauds(e.name) for e in ENTITIES if e.labelled]
    return tuple(found)


# All that a counterfactual may change. The merchant, its category, and amounts paid in the past are not among them.
LEVERS = _levers()
assert {e.name for e in ENTITIES} == set(_EFFORT)
assert len({lever.name for lever in LEVERS}) == len(LEVERS)
