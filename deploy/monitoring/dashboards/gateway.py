"""The processes that answer: doors, batches, steps, the event loop, traces."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import (
    PICKED,
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
from gateway.contracts.decision import Door
from gateway.contracts.metrics import GOOD_WITHIN_S

LATENCY, STEP, PAUSE = "fraudgate_decision_latency_seconds", "fraudgate_step_seconds", "fraudgate_pause_seconds"
HTTP = f'door="{Door.HTTP.value}", {PICKED}'

DOOR = Row(
    "The HTTP door",
    (
        Panel(
            "Latency over HTTP",
            "Every answer by its time. A second band above the first is a cause of its own: see the steps and the event loop.",
            Unit.SECONDS,
            one(rate(LATENCY + "_bucket", "le", where=HTTP), "{{le}}"),
            Kind.HEATMAP,
        ),
        Panel(
            "Quantiles over HTTP",
            "The same as lines.",
            Unit.SECONDS,
            quantiles(LATENCY, 0.5, 0.95, 0.99, 0.999, where=HTTP),
            limits=((GOOD_WITHIN_S[Door.HTTP], Colour.BAD),),
        ),
        Panel(
            "In flight, and how many may be",
            "Accepted and not yet answered. At the limit that admission found, what comes on top is answered 429.",
            Unit.COUNT,
            (
                Query(total("fraudgate_in_flight", "instance", where=PICKED), "in flight {{instance}}"),
                Query(total("fraudgate_in_flight_limit", "instance", where=PICKED), "limit {{instance}}"),
            ),
        ),
        Panel(
            "Refused over HTTP",
            "By reason; overloaded and draining are ours, the others a caller's (docs/api.md).",
            Unit.PER_SECOND,
            one(rate("fraudgate_refused_total", "reason", where=HTTP), "{{reason}}"),
            Kind.STACK,
        ),
        Panel(
            "Connections",
            "Open ones, and those that are not read for a moment because they were told 429.",
            Unit.COUNT,
            (
                Query(total("fraudgate_http_connections", where=PICKED), "open"),
                Query(total("fraudgate_http_connections_held", where=PICKED), "held"),
            ),
        ),
        Panel(
            "Connections ended or refused",
            "One too many, or too slow in sending a request or reading an answer.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_http_connections_refused_total", where=PICKED), "one too many"),
                Query(rate("fraudgate_http_connections_slow_total", where=PICKED), "slow"),
            ),
        ),
    ),
)

BATCHES = Row(
    "Batches and steps",
    (
        Panel(
            "p99 of the steps",
            "Which step is slow: features is Redis, publish the local log (HTTP), commit Kafka's transaction.",
            Unit.SECONDS,
            one(quantile(0.99, STEP, "step", where=PICKED), "{{step}}"),
        ),
        Panel(
            "Median of the steps",
            "The same of the usual batch.",
            Unit.SECONDS,
            one(quantile(0.5, STEP, "step", where=PICKED), "{{step}}"),
        ),
        Panel(
            "Decisions in a batch",
            "Median by door. It grows with the load: a batch shares what each batch costs.",
            Unit.COUNT,
            one(quantile(0.5, "fraudgate_batch_rows", "door", where=PICKED), "{{door}}"),
        ),
        Panel(
            "Retries",
            "Answered or skipped because they were decided before, by door.",
            Unit.PER_SECOND,
            one(rate("fraudgate_duplicates_total", "door", where=PICKED), "{{door}}"),
        ),
        Panel(
            "Decided without Redis for want of time",
            "Their deadline was too near for a wait: callers with short deadlines, or an overload.",
            Unit.PER_SECOND,
            one(rate("fraudgate_hurried_total", where=PICKED), "hurried"),
        ),
        Panel(
            "The model's reasons",
            "By the model, too late for that, or by a model that has no explanation: the last two say MODEL_SCORE_HIGH alone.",
            Unit.PER_SECOND,
            one(rate("fraudgate_reasons_total", "outcome", where=PICKED), "{{outcome}}"),
            Kind.STACK,
        ),
    ),
)

PROCESS = Row(
    "The process",
    (
        Panel(
            "Event loop",
            "Latest it came to what was due in the last second. Above some 20 ms the process is short of CPU.",
            Unit.SECONDS,
            one(most("fraudgate_loop_lag_max_seconds", "instance", where=PICKED), "{{instance}}"),
            limits=((0.02, Colour.WARN), (0.1, Colour.BAD)),
        ),
        Panel(
            "p99 of pauses",
            "How late the event loop came (loop), and pauses of the garbage collector (gc).",
            Unit.SECONDS,
            one(quantile(0.99, PAUSE, "of", where=PICKED), "{{of}}"),
        ),
        Panel(
            "Traces",
            "Decisions traced, by what became of their trace (docs/tracing.md). Nothing here costs a decision.",
            Unit.PER_SECOND,
            one(rate("fraudgate_traces_total", "outcome", where=PICKED), "{{outcome}}"),
        ),
        Panel(
            "What runs",
            "Version, features and policy of each gateway. Two rows of one thing: a deploy is under way, or was forgotten.",
            Unit.COUNT,
            one(f"fraudgate_build_info{{{PICKED}}}"),
            Kind.TABLE,
            width=16,
        ),
        Panel(
            "Traces waiting",
            "For the collector; beyond the setting trace_waiting_max they are dropped.",
            Unit.COUNT,
            one(total("fraudgate_traces_waiting", "instance", where=PICKED), "{{instance}}"),
        ),
        Panel(
            "Console",
            "Browsers that watch it, and how often one was turned away or told no more in the last hour.",
            Unit.COUNT,
            (
                Query(total("fraudgate_console_viewers", where=PICKED), "watching"),
                Query(f"sum (increase(fraudgate_console_refused_total{{{PICKED}}}[1h]))", "turned away"),
                Query(f"sum (increase(fraudgate_console_dropped_total{{{PICKED}}}[1h]))", "told no more"),
            ),
        ),
    ),
)

BOARD = Board(
    "fraudgate-gateway",
    "Fraudgate: gateway",
    "The processes that answer: the HTTP door, batches and their steps, the event loop, traces.",
    (DOOR, BATCHES, PROCESS),
    by_instance=True,
)
