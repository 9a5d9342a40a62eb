"""Models: who scores, challenger and guard, shadows, drift, exploration."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import Board, Colour, Kind, Panel, Query, Row, Unit, least, most, one, quantile, rate, total

SERVE = Row(
    "Who scores",
    (
        Panel(
            "The champion",
            "The model of each gateway. Two versions for longer than a pull takes: one gateway couldn't load the new one.",
            Unit.COUNT,
            one("fraudgate_model_info"),
            Kind.TABLE,
            width=12,
        ),
        Panel(
            "Scored by",
            "Decisions by the route whose model scored them.",
            Unit.PER_SECOND,
            one(rate("fraudgate_routed_total", "route"), "{{route}}"),
            Kind.STACK,
            width=6,
        ),
        Panel(
            "Refused models",
            "Failed a check (digest, fingerprint, golden rows, signature) and don't serve: the model before them does.",
            Unit.COUNT,
            one("sum (increase(fraudgate_model_refused_total[1h]))", "refused in an hour"),
            width=6,
            limits=((0.5, Colour.BAD),),
        ),
        Panel(
            "A model scores",
            "1 while every gateway has a model. 0: one decides by rules alone.",
            Unit.YES,
            one(least("fraudgate_model_serving"), "scores"),
            Kind.NUMBER,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
        Panel(
            "Model's time",
            "Of a batch in the model's step.",
            Unit.SECONDS,
            (
                Query(quantile(0.5, "fraudgate_step_seconds", where='step="model"'), "p50"),
                Query(quantile(0.99, "fraudgate_step_seconds", where='step="model"'), "p99"),
            ),
        ),
        Panel(
            "Decided without a model",
            "rules_only and static_policy: there was none, or no time for it.",
            Unit.PER_SECOND,
            one(rate("fraudgate_degraded_total", "kind", where='kind=~"rules_only|static_policy"'), "{{kind}}"),
        ),
        Panel(
            "The model's reasons",
            "Working them out, a batch.",
            Unit.SECONDS,
            (Query(quantile(0.99, "fraudgate_step_seconds", where='step="reasons"'), "p99"),),
        ),
    ),
)

CHALLENGER = Row(
    "Challenger, guard, shadows",
    (
        Panel(
            "Challenger's share",
            "Part of the cards that it gets. 0 after the guard took it out.",
            Unit.SHARE,
            one(most("fraudgate_challenger_share"), "share"),
            Kind.NUMBER,
            width=4,
        ),
        Panel(
            "Taken out by the guard",
            "1 while it keeps the challenger out. fraudgate route clears it, after a look at why.",
            Unit.YES,
            one(most("fraudgate_guard_out"), "out"),
            Kind.NUMBER,
            width=4,
            limits=((1, Colour.BAD),),
        ),
        Panel(
            "Evidence against the challenger",
            "By test, on a logarithmic scale from 0; at 1 the guard takes it out.",
            Unit.RATIO,
            one(most("fraudgate_guard_evidence", "test"), "{{test}}"),
            limits=((0.7, Colour.WARN), (1, Colour.BAD)),
        ),
        Panel(
            "Guard",
            "Payments that champion and challenger have both decided, and alarms by test.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_guard_pairs_total"), "pairs"),
                Query(rate("fraudgate_guard_alarms_total", "test"), "alarm: {{test}}"),
            ),
        ),
        Panel(
            "Shadows: scored",
            "Decisions that a shadow model scored too. On a busy gateway a sample.",
            Unit.PER_SECOND,
            one(rate("fraudgate_shadow_scored_total", "route"), "{{route}}"),
        ),
        Panel(
            "Trouble after the answer",
            "None of it touches a decision. failed: a shadow or the challenger could not score. dropped: too many waited. unpublished:"
            " Kafka didn't take a score.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_shadow_failed_total"), "shadow failed"),
                Query(rate("fraudgate_challenger_failed_total"), "challenger failed"),
                Query(rate("fraudgate_slack_dropped_total"), "dropped"),
                Query(rate("fraudgate_shadow_unpublished_total"), "unpublished"),
            ),
        ),
        Panel(
            "Waiting to be scored after the answer",
            "Batches for shadows and guard.",
            Unit.COUNT,
            one(total("fraudgate_slack_batches", "instance"), "{{instance}}"),
        ),
    ),
)

DRIFT = Row(
    "Drift",
    (
        Panel(
            "PSI, the ten largest",
            "Population stability index of features, score, bands and decisions against the training rows, of the newest window. Usual"
            " reading: 0.1 is a change, 0.25 a large one.",
            Unit.RATIO,
            one("topk(10, max by (measure) (fraudgate_jobs_drift_psi))", "{{measure}}"),
            limits=((0.1, Colour.WARN), (0.25, Colour.BAD)),
            width=12,
        ),
        Panel(
            "KS, the ten largest",
            "Kolmogorov-Smirnov statistic, likewise.",
            Unit.RATIO,
            one("topk(10, max by (measure) (fraudgate_jobs_drift_ks))", "{{measure}}"),
            width=12,
        ),
        Panel(
            "Measures that are alarms",
            "Each began with a message on the topic alerts.",
            Unit.COUNT,
            (
                Query("sum (fraudgate_jobs_drift_alarm)", "now"),
                Query("sum (increase(fraudgate_jobs_drift_alarms_total[1h]))", "began in an hour"),
            ),
            Kind.NUMBER,
            width=6,
            limits=((0.5, Colour.BAD),),
        ),
        Panel(
            "Has training rows to compare with",
            "1 while the champion has. 0: drift is not watched.",
            Unit.YES,
            one(least("fraudgate_jobs_drift_reference"), "has"),
            Kind.NUMBER,
            width=6,
            limits=((1, Colour.GOOD),),
            below=Colour.WARN,
        ),
        Panel(
            "Windows compared",
            "And receipts that came too late for theirs.",
            Unit.COUNT,
            (
                Query("sum (increase(fraudgate_jobs_drift_windows_total[1h]))", "windows in an hour"),
                Query("sum (increase(fraudgate_jobs_drift_late_total[1h]))", "late receipts in an hour"),
            ),
            width=6,
        ),
        Panel(
            "Drift is behind",
            "Between the wall clock and the event time that it has come to.",
            Unit.SECONDS,
            one("time() - max (fraudgate_jobs_drift_stream_timestamp_seconds)", "behind"),
            width=6,
        ),
    ),
)

EXPLORE = Row(
    "Exploration",
    (
        Panel(
            "Explored",
            "Payments approved although the policy would decline them, to learn their labels; and those that the day's loss cap had no room"
            " for.",
            Unit.PER_SECOND,
            (Query(rate("fraudgate_explored_total"), "explored"), Query(rate("fraudgate_explore_capped_total"), "no room")),
            width=12,
        ),
        Panel(
            "Of the day's loss cap",
            "Amounts so approved today, minor units, by all gateways; and since each process started.",
            Unit.COUNT,
            (
                Query(most("fraudgate_explore_spent_minor"), "of today's cap"),
                Query(total("fraudgate_explored_minor_total"), "since the start"),
            ),
            width=12,
        ),
    ),
)

BOARD = Board(
    "fraudgate-models",
    "Fraudgate: models",
    "Which models score, how challenger, guard and shadows do, whether the payments still look like the training rows.",
    (SERVE, CHALLENGER, DRIFT, EXPLORE),
)
