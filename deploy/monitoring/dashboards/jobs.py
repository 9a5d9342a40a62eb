"""The Spark streams: bronze, silver, gold, labels, drift and bursts."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import Board, Colour, Kind, Panel, Query, Row, Unit, least, most, one, quantile, rate, total
from gateway.contracts.metrics import FRESH_WITHIN_S

BATCH = "fraudgate_jobs_batch_seconds"

RUN = Row(
    "Do they run?",
    (
        Panel(
            "Queries that run",
            "1 while the query runs. At 0 its supervisor starts it again, or has given up: fraudgate status tells.",
            Unit.YES,
            one(least("fraudgate_jobs_up", "query"), "{{query}}"),
            Kind.NUMBER,
            width=12,
            height=6,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
        Panel(
            "Failures",
            "Of a query that its supervisor started again.",
            Unit.COUNT,
            one("sum by (query) (increase(fraudgate_jobs_restarts_total[1h]))", "{{query}}"),
            width=6,
            height=6,
            limits=((0.5, Colour.WARN), (3, Colour.BAD)),
        ),
        Panel(
            "Since the last batch",
            "How long ago each query's last batch ended. A query with nothing to do ends none.",
            Unit.SECONDS,
            one("time() - max by (query) (fraudgate_jobs_batch_timestamp_seconds)", "{{query}}"),
            width=6,
            height=6,
        ),
    ),
)

FRESH = Row(
    "Freshness and lag",
    (
        *(
            Panel(
                f"Freshness of {name}",
                f"Age of the oldest Kafka record of the last batch when the batch was written. Promised: {promised:g} s.",
                Unit.SECONDS,
                one(most("fraudgate_jobs_freshness_seconds", where=f'query="{name}"'), name),
                width=6,
                limits=((promised, Colour.BAD),),
                least=0,
            )
            for name, promised in FRESH_WITHIN_S.items()
        ),
        Panel(
            "Lag in Kafka",
            "Records that bronze doesn't hold yet. The others read what bronze has written.",
            Unit.COUNT,
            one(total("fraudgate_jobs_kafka_lag_records"), "records"),
            width=6,
        ),
    ),
)

BATCHES = Row(
    "Batches",
    (
        Panel(
            "Median time of a batch",
            "By query. Longer than the query's trigger: it can't keep up, and its freshness grows.",
            Unit.SECONDS,
            one(quantile(0.5, BATCH, "query"), "{{query}}"),
        ),
        Panel("p95 of a batch", "By query.", Unit.SECONDS, one(quantile(0.95, BATCH, "query"), "{{query}}")),
        Panel(
            "Part of the time spent in batches",
            "By query: at 1 it works without a pause.",
            Unit.SHARE,
            one(rate(BATCH + "_sum", "query"), "{{query}}"),
            limits=((1, Colour.BAD),),
            least=0,
        ),
        Panel("Rows written", "By table.", Unit.PER_SECOND, one(rate("fraudgate_jobs_rows_total", "table"), "{{table}}")),
        Panel(
            "Refused",
            "Records that went to the table quarantine, by reason. The gateway refuses the same.",
            Unit.PER_SECOND,
            one(rate("fraudgate_jobs_quarantined_total", "reason"), "{{reason}}"),
            Kind.STACK,
        ),
        Panel(
            "Dropped",
            "duplicates: their transaction_id was seen. late: behind the watermark, which is never expected.",
            Unit.PER_SECOND,
            (Query(rate("fraudgate_jobs_duplicates_total"), "duplicates"), Query(rate("fraudgate_jobs_late_total"), "late")),
        ),
    ),
)

STATE = Row(
    "State, labels, bursts",
    (
        Panel(
            "Ids remembered",
            "By query, to drop repetitions. It is bounded by the setting dedup_window_s and the load.",
            Unit.COUNT,
            one(most("fraudgate_jobs_state_rows", "query"), "{{query}}"),
        ),
        Panel("Memory of the state", "By query.", Unit.BYTES, one(most("fraudgate_jobs_state_memory_bytes", "query"), "{{query}}")),
        Panel(
            "Labels",
            "waiting: their payment isn't there yet, and they are tried again with each batch. unmatched: came so.",
            Unit.COUNT,
            (
                Query(total("fraudgate_jobs_labels_waiting"), "waiting"),
                Query("sum (increase(fraudgate_jobs_labels_unmatched_total[1h]))", "unmatched in an hour"),
            ),
        ),
        Panel(
            "Bursts of declines",
            "Merchants, devices and BINs with unusually many declines now: somebody tests cards there.",
            Unit.COUNT,
            (
                Query(total("fraudgate_jobs_bursts_active"), "going on"),
                Query("sum (increase(fraudgate_jobs_bursts_total[1h]))", "began in an hour"),
            ),
        ),
        Panel(
            "Entities watched for bursts",
            "And those forgotten to make room, whose bursts may be missed: raise the setting burst_entities_max.",
            Unit.COUNT,
            (
                Query(total("fraudgate_jobs_burst_entities"), "watched"),
                Query("sum (increase(fraudgate_jobs_burst_evicted_total[1h]))", "forgotten in an hour"),
            ),
        ),
        Panel(
            "Bursts by entity",
            "That began in the last hour.",
            Unit.COUNT,
            one("sum by (entity) (increase(fraudgate_jobs_bursts_total[1h]))", "{{entity}}"),
        ),
    ),
)

BOARD = Board(
    "fraudgate-jobs",
    "Fraudgate: feature jobs",
    "The Spark streams: whether they run, how fresh what they write is, how long batches take.",
    (RUN, FRESH, BATCHES, STATE),
)
