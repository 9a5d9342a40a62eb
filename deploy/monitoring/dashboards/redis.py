"""Redis and the features that are read from it."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import Board, Colour, Kind, Panel, Query, Row, Unit, least, most, one, quantile, rate, total

DECISIONS = "fraudgate_decisions_total"
# Without all entity features.
SHORT = 'kind=~"request_only|stale_features"'
ROUND_TRIP = "fraudgate_redis_round_trip_seconds"

ANSWERS = Row(
    "Does it answer?",
    (
        Panel(
            "Connected",
            "1 while every gateway has a probed connection. 0: one decides without entity features (request_only).",
            Unit.YES,
            one(least("fraudgate_redis_ready"), "connected"),
            Kind.NUMBER,
            width=4,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
        Panel(
            "Round trips",
            "From writing a batch's commands until all replies are read. Beyond the setting feature_budget_ms the HTTP door goes on"
            " without.",
            Unit.SECONDS,
            tuple(Query(quantile(share, ROUND_TRIP, "door"), f"p{share * 100:g} {{{{door}}}}") for share in (0.5, 0.99)),
            width=10,
        ),
        Panel(
            "Not answered in time",
            "Batches that went on without features.",
            Unit.PER_SECOND,
            one(rate("fraudgate_redis_timeouts_total", "door"), "{{door}}"),
            width=5,
            limits=((0.000001, Colour.WARN),),
        ),
        Panel(
            "Connections made",
            "The first ones included. A steady rate: something ends them.",
            Unit.PER_SECOND,
            one(rate("fraudgate_redis_connects_total"), "connections"),
            width=5,
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        Panel(
            "Memory against its limit",
            "At the limit Redis refuses writes and nothing is evicted: payments are decided, but not observed.",
            Unit.BYTES,
            (
                Query(most("fraudgate_redis_memory_used_bytes", "node"), "used {{node}}"),
                Query(most("fraudgate_redis_memory_limit_bytes", "node"), "limit {{node}}"),
            ),
            least=0,
        ),
        Panel(
            "Writes refused",
            "Transactions that were not observed because Redis was at its limit, and answers that could not be stored for retries.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_redis_writes_refused_total"), "not observed"),
                Query(rate("fraudgate_idempotency_records_failed_total"), "not stored for retries"),
            ),
            limits=((0.000001, Colour.BAD),),
        ),
        Panel("Clients", "Connections that Redis serves.", Unit.COUNT, one(most("fraudgate_redis_clients", "node"), "{{node}}")),
    ),
)

FEATURES = Row(
    "Features",
    (
        Panel(
            "Decided on less than all features",
            "request_only: without Redis. stale_features: a value may be short or ahead, because the Spark jobs are behind, a head"
            " overflowed, or Redis lost data.",
            Unit.SHARE,
            one(
                f"{rate('fraudgate_degraded_total', 'kind', where=SHORT)} / scalar({rate(DECISIONS)})",
                "{{kind}}",
            ),
        ),
        Panel(
            "Not told to Redis yet",
            "Decided while it was away. It is told as soon as it answers, so that no window misses them.",
            Unit.COUNT,
            one(total("fraudgate_unobserved"), "transactions"),
        ),
        Panel(
            "Never told, or not understood",
            "Too many were waiting; packed values of a version or key that is not ours.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_unobserved_dropped_total"), "never told"),
                Query(rate("fraudgate_packed_values_refused_total"), "values not used"),
            ),
            limits=((0.000001, Colour.WARN),),
        ),
        Panel(
            "Tiles written",
            "Entities whose tiles, or whose frauds, the Spark jobs wrote to Redis.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_jobs_tiles_written_total"), "tiles"),
                Query(rate("fraudgate_jobs_labels_written_total"), "frauds"),
            ),
        ),
        Panel(
            "Rebuilt",
            "Times that the Spark jobs restored Redis from the tables: it had lost data.",
            Unit.COUNT,
            (
                Query(total("fraudgate_jobs_tiles_rebuilt_total"), "tiles"),
                Query(total("fraudgate_jobs_labels_rebuilt_total"), "frauds"),
            ),
        ),
        Panel(
            "Parity: compared",
            "Values of sampled receipts that fraudgate parity --live computed again from the tables.",
            Unit.PER_SECOND,
            one(rate("fraudgate_parity_compared_total"), "values"),
        ),
        Panel(
            "Parity: different",
            "Logged values that differ from the tables', or that no receipt held. Promised: none.",
            Unit.COUNT,
            (
                Query("sum (increase(fraudgate_parity_different_total[1h]))", "different"),
                Query("sum (increase(fraudgate_parity_missing_total[1h]))", "missing"),
            ),
            limits=((0.5, Colour.BAD),),
        ),
        Panel(
            "Parity: last look",
            "How long ago the last sample was compared.",
            Unit.SECONDS,
            one("time() - max (fraudgate_parity_checked_timestamp_seconds)", "ago"),
            Kind.NUMBER,
        ),
        Panel(
            "Parity: flagged stale",
            "Sampled receipts that said themselves that a value may be stale; they are not compared.",
            Unit.PER_SECOND,
            one(rate("fraudgate_parity_stale_receipts_total"), "receipts"),
        ),
    ),
)

BOARD = Board(
    "fraudgate-redis",
    "Fraudgate: Redis and features",
    "Whether Redis answers and has room, and whether what is read from it is whole, fresh and right.",
    (ANSWERS, MEMORY, FEATURES),
)
