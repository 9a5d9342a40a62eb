"""What comes by Kafka and what goes to it, and the local log that bridges its absence."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import Board, Colour, Kind, Panel, Query, Row, Unit, least, most, one, quantile, rate, total

INTO = Row(
    "Into the gateway",
    (
        Panel(
            "Lag by partition",
            "Records of transactions that no gateway has consumed. All growing: too little capacity. One growing: its gateway is stuck.",
            Unit.COUNT,
            one(total("fraudgate_consumer_lag_records", "partition"), "partition {{partition}}"),
            Kind.STACK,
        ),
        Panel(
            "Standstill",
            "How long the committed offset of a partition that has more has stood still, the longest. Beyond the setting kafka_watchdog_s"
            " the Kafka door starts anew by itself.",
            Unit.SECONDS,
            one(most("fraudgate_consumer_standstill_seconds", "instance"), "{{instance}}"),
            limits=((30, Colour.WARN), (60, Colour.BAD)),
        ),
        Panel(
            "Consumed",
            "Records of transactions whose offsets were committed, and those decided over HTTP before, which are skipped.",
            Unit.PER_SECOND,
            one(rate("fraudgate_consumed_total", "instance"), "{{instance}}"),
            Kind.STACK,
        ),
        Panel(
            "Commits",
            "One Kafka transaction a chunk: receipts and offsets, all or nothing.",
            Unit.SECONDS,
            (
                Query(quantile(0.5, "fraudgate_step_seconds", where='step="commit"'), "p50"),
                Query(quantile(0.99, "fraudgate_step_seconds", where='step="commit"'), "p99"),
            ),
        ),
        Panel(
            "In the group",
            "1 while every gateway has its partitions. 0: one has none, or Kafka is out of reach.",
            Unit.YES,
            one(least("fraudgate_kafka_connected"), "in the group"),
            Kind.NUMBER,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
        Panel(
            "Sessions",
            "Times a gateway (re)joined its group. Each costs a pause of its partitions.",
            Unit.PER_SECOND,
            one(rate("fraudgate_kafka_sessions_total", "instance"), "{{instance}}"),
        ),
    ),
)

OUT_OF = Row(
    "Out of the HTTP door",
    (
        Panel(
            "Published by topic",
            "Records that Kafka acknowledged. Each decision over HTTP is one on transactions and one on decisions.",
            Unit.PER_SECOND,
            one(rate("fraudgate_published_total", "topic"), "{{topic}}"),
            Kind.STACK,
        ),
        Panel(
            "Waiting for Kafka",
            "Records in memory and in the local log that Kafka hasn't acknowledged. They stay until it has: nothing is lost by waiting.",
            Unit.COUNT,
            (
                Query(total("fraudgate_publish_buffer_records"), "in memory"),
                Query(total("fraudgate_spool_records"), "in the local log"),
            ),
        ),
        Panel(
            "Receipts lost",
            "Dropped because neither the local log nor memory had room. Each is a decision without a receipt.",
            Unit.PER_SECOND,
            one(rate("fraudgate_publish_dropped_total"), "dropped"),
            limits=((0.000001, Colour.BAD),),
        ),
        Panel(
            "Local log: age of the oldest",
            "How long Kafka has not taken what the oldest record says.",
            Unit.SECONDS,
            one(most("fraudgate_spool_age_seconds", "instance"), "{{instance}}"),
            limits=((10, Colour.WARN), (60, Colour.BAD)),
        ),
        Panel(
            "Local log: size",
            "Bytes that wait. The setting spool_mb_max bounds it.",
            Unit.BYTES,
            one(total("fraudgate_spool_bytes", "instance"), "{{instance}}"),
            Kind.STACK,
        ),
        Panel(
            "Local log: written",
            "Every record of the HTTP door goes through it before the caller is answered.",
            Unit.PER_SECOND,
            one(rate("fraudgate_spooled_total"), "records"),
        ),
    ),
)

OTHERS = Row(
    "Other readers",
    (
        Panel(
            "Lag of the feature jobs",
            "Records in Kafka that bronze doesn't hold yet, as its last batch saw it.",
            Unit.COUNT,
            one(total("fraudgate_jobs_kafka_lag_records"), "records"),
        ),
        Panel(
            "Refused on the topic",
            "Messages of transactions that the gateways moved to quarantine, by reason.",
            Unit.PER_SECOND,
            one(rate("fraudgate_refused_total", "reason", where='door="kafka"'), "{{reason}}"),
            Kind.STACK,
        ),
        Panel(
            "Read by the case service",
            "By topic.",
            Unit.PER_SECOND,
            one(rate("fraudgate_cases_read_total", "topic"), "{{topic}}"),
        ),
    ),
)

BOARD = Board(
    "fraudgate-kafka",
    "Fraudgate: Kafka and the local log",
    "What comes by Kafka, what goes to it, and what waits for it.",
    (INTO, OUT_OF, OTHERS),
)
