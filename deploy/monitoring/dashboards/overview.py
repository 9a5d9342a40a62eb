"""The first board to look at: is it well, how much does it do, does it keep its promises."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import (
    Board,
    Colour,
    Kind,
    Panel,
    Query,
    Row,
    Unit,
    most,
    one,
    quantile,
    quantiles,
    rate,
    total,
)
from deploy.monitoring.slo import FAST, SLOS
from gateway.contracts.decision import Door, Outcome
from gateway.contracts.metrics import FRESH_WITHIN_S, GOOD_WITHIN_S

# Of the decisions that are asked for, so many are good; and how fast the budget may burn until somebody is called.
OBJECTIVE = next(slo.objective for slo in SLOS if slo.name == "decisions")
BURN_PAGE = max(burn.factor for burn in FAST)
HTTP, KAFKA = (f'door="{door.value}"' for door in (Door.HTTP, Door.KAFKA))
COSTS = f'outcome!="{Outcome.APPROVE.value}"'
DECISIONS, DEGRADED, LATENCY = "fraudgate_decisions_total", "fraudgate_degraded_total", "fraudgate_decision_latency_seconds"
SLI = "fraudgate_sli_decisions_total"


def good_share(window: str) -> str:
    return f'sum (increase({SLI}{{quality="good"}}[{window}])) / sum (increase({SLI}[{window}]))'


def burn_rate(window: str) -> str:
    return f"(1 - {good_share(window)}) / {1 - OBJECTIVE:.3f}"


WELL = Row(
    "Is it well?",
    (
        Panel(
            "Good decisions, 1 h",
            "Share of the decisions asked for in the last hour that were answered in time"
            f" ({GOOD_WITHIN_S[Door.HTTP] * 1000:g} ms over HTTP), not shed and not failed. Promised: {OBJECTIVE:.1%}.",
            Unit.SHARE,
            one(good_share("1h"), "good"),
            Kind.NUMBER,
            width=4,
            height=5,
            limits=((0.99, Colour.WARN), (OBJECTIVE, Colour.GOOD)),
            below=Colour.BAD,
            decimals=3,
        ),
        Panel(
            "Budget burns, 1 h",
            "How many times faster than allowed the error budget was used in the last hour."
            f" At {BURN_PAGE:g} the budget of 30 days lasts two days,"
            " and somebody is called.",
            Unit.RATIO,
            one(burn_rate("1h"), "times"),
            Kind.NUMBER,
            width=4,
            height=5,
            limits=((1.0, Colour.WARN), (BURN_PAGE, Colour.BAD)),
            decimals=1,
        ),
        Panel(
            "p99 over HTTP",
            "99 of 100 answers leave within this time after the request's arrival. Promised: 100 ms.",
            Unit.SECONDS,
            one(quantile(0.99, LATENCY, where=HTTP), "p99"),
            Kind.NUMBER,
            width=4,
            height=5,
            limits=((0.08, Colour.WARN), (GOOD_WITHIN_S[Door.HTTP], Colour.BAD)),
        ),
        Panel("Decisions a second", "Through both doors.", Unit.PER_SECOND, one(rate(DECISIONS), "decisions"), Kind.NUMBER, 4, 5),
        Panel(
            "Degraded",
            "Share of the decisions that had to do without something: Redis, fresh features, or a model. 0 in normal service.",
            Unit.SHARE,
            one(f"{rate(DEGRADED)} / {rate(DECISIONS)}", "degraded"),
            Kind.NUMBER,
            width=4,
            height=5,
            limits=((0.001, Colour.WARN), (0.05, Colour.BAD)),
        ),
        Panel(
            "Gateway processes",
            "Processes that serve. Fewer than were started: one is down, or still starting.",
            Unit.COUNT,
            one(total("fraudgate_workers"), "processes"),
            Kind.NUMBER,
            width=4,
            height=5,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
    ),
)

WORK = Row(
    "Decisions",
    (
        Panel(
            "Decisions by door",
            "HTTP answers a caller that waits; what came by Kafka is committed to the topic decisions.",
            Unit.PER_SECOND,
            one(rate(DECISIONS, "door"), "{{door}}"),
            Kind.STACK,
        ),
        Panel(
            "Decisions by outcome",
            "All decisions of both doors.",
            Unit.PER_SECOND,
            one(rate(DECISIONS, "outcome"), "{{outcome}}"),
            Kind.STACK,
        ),
        Panel(
            "Decisions that cost a customer something",
            "Share of challenge, review and decline. When it moves without a change of policy or model, the payments have changed: see the"
            " board on models.",
            Unit.SHARE,
            one(f"{rate(DECISIONS, 'outcome', where=COSTS)} / scalar({rate(DECISIONS)})", "{{outcome}}"),
        ),
        Panel(
            "Latency over HTTP",
            "From a request's arrival to its answer. The dashed line is the promise for p99.",
            Unit.SECONDS,
            quantiles(LATENCY, 0.5, 0.99, 0.999, where=HTTP),
            limits=((GOOD_WITHIN_S[Door.HTTP], Colour.BAD),),
        ),
        Panel(
            "Latency through Kafka",
            "From the producer's timestamp to the commit of the receipt; what waits in the topic counts.",
            Unit.SECONDS,
            quantiles(LATENCY, 0.5, 0.99, 0.999, where=KAFKA),
            limits=((GOOD_WITHIN_S[Door.KAFKA], Colour.BAD),),
        ),
        Panel(
            "Degraded by kind",
            "request_only: without Redis. stale_features: the Spark jobs are behind. rules_only: without a model. static_policy: without"
            " both.",
            Unit.PER_SECOND,
            one(rate(DEGRADED, "kind"), "{{kind}}"),
            Kind.STACK,
        ),
    ),
)

LEVEL = Row(
    "Service level",
    (
        Panel(
            "Burn rate by window",
            f"How many times faster than allowed the error budget of {1 - OBJECTIVE:.1%} is used. Alerts ask that a short window and a long"
            " one burn at once (docs/monitoring.md); the dashed line is where somebody is called.",
            Unit.RATIO,
            tuple(Query(burn_rate(window), window) for window in ("5m", "30m", "1h", "6h")),
            width=12,
            limits=((BURN_PAGE, Colour.BAD),),
            least=0,
        ),
        Panel(
            "Good and bad decisions",
            "bad: late, shed (429), or failed.",
            Unit.PER_SECOND,
            one(rate(SLI, "quality"), "{{quality}}"),
            Kind.STACK,
            width=6,
        ),
        Panel(
            "Refused by reason",
            "Inputs that were not decided: a caller's mistakes, and what was shed.",
            Unit.PER_SECOND,
            one(rate("fraudgate_refused_total", "reason"), "{{reason}}"),
            Kind.STACK,
            width=6,
        ),
    ),
)

FRESHNESS = Row(
    "Freshness of the tables",
    tuple(
        Panel(
            f"Freshness of {name}",
            f"Age of the oldest Kafka record of the last batch when the batch was written to {name}. Promised: {promised:g} s.",
            Unit.SECONDS,
            one(most("fraudgate_jobs_freshness_seconds", where=f'query="{name}"'), name),
            limits=((promised, Colour.BAD),),
            least=0,
        )
        for name, promised in FRESH_WITHIN_S.items()
    ),
)

BOARD = Board(
    "fraudgate-overview",
    "Fraudgate: overview",
    "Is it well? Service level and error budget, throughput, latency, outcomes, and the freshness of the tables against their promises.",
    (WELL, WORK, LEVEL, FRESHNESS),
)
