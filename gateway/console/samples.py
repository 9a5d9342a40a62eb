"""Samples of metrics, and what follows from two readings of them: rates and percentiles. Pure; used by the console's gatherer.

A reading of the gateway's own metrics costs about 0.3 ms, the text of the feature jobs about 1 ms.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import Metric

from gateway.worker_metrics import Families

Labels = tuple[tuple[str, str], ...]
_line = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ ]+)(?: -?[0-9]+)?").fullmatch
_pairs = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"').findall
_CREATED = "_created"
TEXT_BYTES_MAX = 4 * 1024 * 1024
LE = "le"


class Samples:
    """One reading: values by the sample's name (`..._total`, `..._bucket`) and labels."""

    def __init__(self, values: Mapping[str, Mapping[Labels, float]]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __len__(self) -> int:
        return len(self._values)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over everything that has these labels; None where nothing does."""
        wanted = set(labels.items())
        found = [value for have, value in self._values.get(name, {}).items() if wanted.issubset(have)]
        return sum(found) if found else None

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums by the values of one label."""
        wanted, found = set(labels.items()), dict[str, float]()
        for have, value in self._values.get(name, {}).items():
            key = dict(have).get(label)
            if key is not None and wanted.issubset(have):
                found[key] = found.get(key, 0.0) + value
        return found

    def labels_of(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for labels in self._values.get(name, {})]

    def buckets(self, histogram: str, **labels: str) -> dict[float, float]:
        """Cumulative counts by upper bound, ascending."""
        found = self.by(f"{histogram}_bucket", LE, **labels)
        return dict(sorted((float(bound), count) for bound, count in found.items()))


def samples_of(metrics: Iterable[Metric]) -> Samples:
    values: dict[str, dict[Labels, float]] = {}
    for metric in metrics:
        for sample in metric.samples:
            if not sample.name.endswith(_CREATED):
                values.setdefault(sample.name, {})[tuple(sample.labels.items())] = sample.value
    return Samples(values)


def samples_of_families(families: Families, names: Iterable[str]) -> Samples:
    """Those of `families` that have samples of one of `names`."""
    wanted = set(names)
    values: dict[str, dict[Labels, float]] = {}
    for name, family in families.items():
        if not wanted.isdisjoint((name, f"{name}_total", f"{name}_bucket")):
            for (sample, labels), value in family.values.items():
                values.setdefault(sample, {})[labels] = value
    return Samples(values)


def read_text(text: bytes, wanted: Callable[[str], bool] = lambda _: True) -> Samples:
    """Prometheus' exposition format; samples whose name isn't `wanted` are passed over. Raises ValueError for what it isn't."""
    if len(text) > TEXT_BYTES_MAX:
        raise ValueError("the metrics are larger than they can be")
    values: dict[str, dict[Labels, float]] = {}
    for line in text.decode().splitlines():
        if not line or line[0] == "#" or not wanted(line):
            continue
        found = _line(line)
        if found is None:
            raise ValueError("a line is no sample")
        name, labels, value = found.groups()
        if not name.endswith(_CREATED):
            values.setdefault(name, {})[tuple(_pairs(labels or ""))] = float(value)
    return Samples(values)


@dataclass(frozen=True)
class Reading:
    """`at_s` is monotonic."""

    at_s: float
    samples: Samples


def increase(before: float | None, after: float | None) -> float:
    """Of a counter. One that fell was begun anew: all it has is new."""
    if after is None:
        return 0.0
    if before is None:
        # It wasn't there: made since, by its first event.
        return after
    return after - before if after >= before else after


class Window:
    """Readings of the last `span_s` seconds: rates are over what they span."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        self._readings.append(reading)
        # One from before the span stays, so that a rate is over no less than that once there was as much.
        while len(self._readings) > 2 and self._readings[1].at_s <= reading.at_s - self._span_s:
            self._readings.popleft()

    @property
    def newest(self) -> Samples:
        return self._readings[-1].samples

    @property
    def seconds(self) -> float:
        return self._readings[-1].at_s - self._readings[0].at_s if self._readings else 0.0

    def rate(self, name: str, **labels: str) -> float | None:
        """A second; None before there are two readings."""
        if self.seconds <= 0:
            return None
        return increase(self._readings[0].samples.total(name, **labels), self.newest.total(name, **labels)) / self.seconds

    def rates(self, name: str, label: str, **labels: str) -> dict[str, float]:
        if self.seconds <= 0:
            return {}
        before = self._readings[0].samples.by(name, label, **labels)
        after = self.newest.by(name, label, **labels)
        return {key: increase(before.get(key), value) / self.seconds for key, value in after.items()}

    def quantiles(self, histogram: str, shares: Iterable[float], **labels: str) -> list[float | None]:
        """In the histogram's unit, of what was observed within the window; None where nothing was."""
        if self.seconds <= 0:
            return [None for _ in shares]
        before = self._readings[0].samples.buckets(histogram, **labels)
        after = self.newest.buckets(histogram, **labels)
        return [quantile(grown(before, after), share) for share in shares]


def grown(before: Mapping[float, float], after: Mapping[float, float]) -> dict[float, float]:
    """Cumulative counts of what came between two readings of a histogram; all of `after` when it was begun anew."""
    if any(after.get(bound, 0.0) < count for bound, count in before.items()):
        return dict(after)
    return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def quantile(cumulative: Mapping[float, float], share: float) -> float | None:
    """Within the bucket as if its observations lay evenly, as Prometheus' histogram_quantile; the last finite bound beyond all."""
    bounds = list(cumulative)
    total = cumulative[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    rank, below, lower = share * total, 0.0, 0.0
    for bound in bounds:
        count = cumulative[bound]
        if count >= rank and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (count - below)
        below, lower = count, bound if not math.isinf(bound) else lower
    return lower
