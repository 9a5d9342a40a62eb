"""Service level objectives, and the alerts on how fast their error budgets burn.

Windows and factors are those of Google's SRE workbook (chapter 5, multi-window multi-burn-rate): a page for 2 % of a month's budget in an
hour or 5 % in six, a ticket for 10 % in a day or in three. The short window beside each long one ends an alert soon after its cause.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.contracts.decision import Door
from gateway.contracts.metrics import FRESH_WITHIN_S, GOOD_WITHIN_S

PAGE, TICKET = "page", "ticket"
# The share of what was asked for that was bad, by slo and by what the SLO is told by; each window is a recording rule.
RECORD = "fraudgate:slo_bad:ratio"
LATE = "fraudgate:table_late:bool"


@dataclass(frozen=True)
class Burn:
    """The budget burns `factor` times as fast as it may, over the long window and still over the short one."""

    long: str
    short: str
    factor: float


FAST = (Burn("1h", "5m", 14.4), Burn("6h", "30m", 6.0))
SLOW = (Burn("1d", "2h", 3.0), Burn("3d", "6h", 1.0))
WINDOWS: tuple[str, ...] = tuple(dict.fromkeys(w for burn in (*FAST, *SLOW) for w in (burn.short, burn.long)))


@dataclass(frozen=True)
class Slo:
    """`bad` is the bad share as PromQL with `$w` for the window. `enough`, likewise, tells that there is more than a handful of it."""

    name: str
    title: str
    objective: float
    bad: str
    by: str
    fast_severity: str
    component: str
    enough: str = ""

    @property
    def budget(self) -> float:
        """The share that may be bad."""
        return round(1 - self.objective, 6)

    def recorded(self, window: str) -> str:
        return f'{RECORD}_{window}{{slo="{self.name}"}}'

    def burns(self, burns: tuple[Burn, ...]) -> str:
        """True for each of `by` whose budget burns as fast as one of `burns` says."""
        found = []
        for burn in burns:
            limit = f"{round(burn.factor * self.budget, 6):g}"
            both = f"{self.recorded(burn.long)} > {limit} and {self.recorded(burn.short)} > {limit}"
            if self.enough:
                both += f" and on ({self.by}) ({self.enough.replace('$w', burn.long)})"
            found.append(f"({both})")
        return " or ".join(found)


_WITHIN_S = GOOD_WITHIN_S[Door.HTTP]
SLOS: tuple[Slo, ...] = (
    Slo(
        "decisions",
        "99.9 % of decisions are good: answered in time (100 ms over HTTP, 1 s through Kafka), not shed, not failed",
        0.999,
        'sum by (door) (rate(fraudgate_sli_decisions_total{quality="bad"}[$w])) / sum by (door) (rate(fraudgate_sli_decisions_total[$w]))',
        "door",
        PAGE,
        "decisions",
        'sum by (door) (increase(fraudgate_sli_decisions_total{quality="bad"}[$w])) > 10',
    ),
    Slo(
        "latency",
        f"99 % of the answers over HTTP come within {_WITHIN_S * 1000:g} ms",
        0.99,
        f'1 - sum by (door) (rate(fraudgate_decision_latency_seconds_bucket{{door="http",le="{_WITHIN_S}"}}[$w]))'
        ' / sum by (door) (rate(fraudgate_decision_latency_seconds_count{door="http"}[$w]))',
        "door",
        PAGE,
        "decisions",
        'sum by (door) (increase(fraudgate_decision_latency_seconds_count{door="http"}[$w])) > 100',
    ),
    Slo(
        "freshness",
        "bronze, silver and gold are younger than " + ", ".join(f"{s:g}" for s in FRESH_WITHIN_S.values()) + " s 95 % of the time",
        0.95,
        f"avg_over_time({LATE}[$w])",
        "query",
        TICKET,
        "jobs",
    ),
)
