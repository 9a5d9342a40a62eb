"""What a dashboard says, without Grafana: boards of rows of panels of queries. Read by the generator, the page and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

GRID_WIDTH = 24
# The instances of the gateway that a reader picked, all at first.
PICKED = 'instance=~"$instance"'


class Kind(StrEnum):
    """How a panel draws."""

    LINES = "lines"
    # Lines over each other, that add up to something.
    STACK = "stack"
    # The newest value, large.
    NUMBER = "number"
    # The buckets of a histogram over time.
    HEATMAP = "heatmap"
    # One row a series, its labels as columns, as of now.
    TABLE = "table"


class Unit(StrEnum):
    """Grafana's names of units."""

    SECONDS = "s"
    PER_SECOND = "cps"
    SHARE = "percentunit"
    BYTES = "bytes"
    COUNT = "short"
    RATIO = "none"
    YES = "bool_yes_no"


class Colour(StrEnum):
    GOOD = "green"
    WARN = "orange"
    BAD = "red"


@dataclass(frozen=True)
class Query:
    """`legend` names its series, with {{label}} in it. It is PromQL with Grafana's $__rate_interval and the board's variables."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """`description` says what it shows and what to make of it. From each of `limits` on a value has its colour, below the first `below`."""

    title: str
    description: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    height: int = 8
    limits: tuple[tuple[float, Colour], ...] = ()
    below: Colour = Colour.GOOD
    least: float | None = None
    most: float | None = None
    decimals: int | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """`uid` is its place in Grafana's URLs. With `by_instance` a reader picks gateways."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    by_instance: bool = False

    @property
    def panels(self) -> Iterator[Panel]:
        for row in self.rows:
            yield from row.panels


def rate(series: str, *by: str, where: str = "") -> str:
    """Sum of a counter's increase a second, by labels."""
    return f"sum{_by(by)} (rate({series}{_where(where)}[$__rate_interval]))"


def quantile(share: float, histogram: str, *by: str, where: str = "") -> str:
    """A quantile over all processes, interpolated within a bucket."""
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', 'le', *by, where=where)})"


def quantiles(histogram: str, *shares: float, where: str = "") -> tuple[Query, ...]:
    return tuple(Query(quantile(share, histogram, where=where), f"p{share * 100:g}") for share in shares)


def total(series: str, *by: str, where: str = "") -> str:
    return f"sum{_by(by)} ({series}{_where(where)})"


def most(series: str, *by: str, where: str = "") -> str:
    return f"max{_by(by)} ({series}{_where(where)})"


def least(series: str, *by: str, where: str = "") -> str:
    return f"min{_by(by)} ({series}{_where(where)})"


def one(expr: str, legend: str = "") -> tuple[Query, ...]:
    return (Query(expr, legend),)


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _where(matchers: str) -> str:
    return f"{{{matchers}}}" if matchers else ""
