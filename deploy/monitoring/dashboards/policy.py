"""What people steer and what people do: policy, lists, reviews, labels, webhooks."""

from __future__ import annotations

from deploy.monitoring.dashboards.spec import Board, Colour, Kind, Panel, Query, Row, Unit, least, most, one, rate, total

POLICY = Row(
    "Policy",
    (
        Panel(
            "Policy in force",
            "By its digest. Two for longer than a moment: one gateway refused the new one.",
            Unit.COUNT,
            one("count by (policy_digest) (fraudgate_build_info)", "{{policy_digest}}"),
            Kind.TABLE,
            width=8,
        ),
        Panel(
            "A policy on disk is refused",
            "1 while it is, and an earlier one serves. fraudgate policy check says why.",
            Unit.YES,
            one(most("fraudgate_policy_refused"), "refused"),
            Kind.NUMBER,
            width=4,
            limits=((1, Colour.BAD),),
        ),
        Panel(
            "Policies read",
            "After the start, in the last hour: taken into use, or refused.",
            Unit.COUNT,
            one("sum by (outcome) (increase(fraudgate_policy_loads_total[1h]))", "{{outcome}}"),
            width=4,
        ),
        Panel(
            "Rules that could not be evaluated",
            "Each is a mistake in the rule; it counts as not fired.",
            Unit.PER_SECOND,
            one(rate("fraudgate_rule_errors_total", "rule"), "{{rule}}"),
            width=8,
            limits=((0.000001, Colour.BAD),),
        ),
        Panel(
            "Rules that fired", "By rule.", Unit.PER_SECOND, one(rate("fraudgate_rule_hits_total", "rule"), "{{rule}}"), Kind.STACK
        ),
        Panel(
            "Rules in shadow that would have fired",
            "By rule; they decide nothing.",
            Unit.PER_SECOND,
            one(rate("fraudgate_shadow_hits_total", "rule"), "{{rule}}"),
            Kind.STACK,
        ),
        Panel(
            "Decisions on listed entities",
            "By list.",
            Unit.PER_SECOND,
            one(rate("fraudgate_list_hits_total", "list"), "{{list}}"),
            Kind.STACK,
        ),
    ),
)

LISTS = Row(
    "Lists",
    (
        Panel(
            "Lists are what they should be",
            "0: changes are missing, or the topic is another one. What is known goes on being used (docs/lists.md).",
            Unit.YES,
            one("1 - max (fraudgate_lists_trouble)", "whole"),
            Kind.NUMBER,
            width=4,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
        Panel(
            "Changes in force",
            "The least and the most of the gateways: apart, one is behind.",
            Unit.COUNT,
            (Query(least("fraudgate_lists_version"), "least"), Query(most("fraudgate_lists_version"), "most")),
            width=5,
        ),
        Panel(
            "Changes not in force yet",
            "As far as known.",
            Unit.COUNT,
            one(most("fraudgate_lists_lag_records"), "changes"),
            width=5,
        ),
        Panel(
            "Entries", "Of all lists, expired ones included.", Unit.COUNT, one(most("fraudgate_lists_entries"), "entries"), width=5
        ),
        Panel(
            "Changes left out",
            "missing: the topic no longer had them when they were read. malformed, or full: never in force.",
            Unit.COUNT,
            (
                Query(most("fraudgate_lists_missing"), "missing"),
                Query(total("fraudgate_lists_skipped_total", "reason"), "{{reason}}"),
            ),
            width=5,
            limits=((1, Colour.BAD),),
        ),
    ),
)

REVIEWS = Row(
    "Reviews and labels",
    (
        Panel(
            "Reviews without a verdict",
            "Growing all day: more is sent to people than they can look at.",
            Unit.COUNT,
            one(total("fraudgate_cases_reviews_open"), "open"),
        ),
        Panel(
            "Queued for a person",
            "In the last hour, by why.",
            Unit.COUNT,
            one("sum by (why) (increase(fraudgate_cases_reviews_queued_total[1h]))", "{{why}}"),
            Kind.STACK,
        ),
        Panel(
            "Verdicts",
            "In the last hour.",
            Unit.COUNT,
            one("sum by (verdict) (increase(fraudgate_cases_verdicts_total[1h]))", "{{verdict}}"),
            Kind.STACK,
        ),
        Panel(
            "Labels by source and state",
            "In the last hour, through the case service.",
            Unit.COUNT,
            one("sum by (source, state) (increase(fraudgate_cases_labels_total[1h]))", "{{source}} {{state}}"),
            Kind.STACK,
        ),
        Panel(
            "Changes of lists",
            "In the last hour, that Kafka acknowledged.",
            Unit.COUNT,
            one("sum by (action) (increase(fraudgate_cases_list_changes_total[1h]))", "{{action}}"),
            Kind.STACK,
        ),
        Panel(
            "Requests refused",
            "By the case service, by reason.",
            Unit.PER_SECOND,
            one(rate("fraudgate_cases_refused_total", "reason"), "{{reason}}"),
            Kind.STACK,
        ),
    ),
)

SERVICE = Row(
    "The case service",
    (
        Panel(
            "Reads from Kafka",
            "1 while it has its partitions.",
            Unit.YES,
            one(least("fraudgate_cases_kafka_connected"), "connected"),
            Kind.NUMBER,
            width=4,
            limits=((1, Colour.GOOD),),
            below=Colour.BAD,
        ),
        Panel(
            "Takes nothing in",
            "1 while as many reviews are open as may be; Kafka keeps the rest.",
            Unit.YES,
            one(most("fraudgate_cases_intake_paused"), "paused"),
            Kind.NUMBER,
            width=4,
            limits=((1, Colour.BAD),),
        ),
        Panel(
            "Outbox",
            "Labels and audit records that wait for Kafka, which are in the file until it has them.",
            Unit.COUNT,
            one(total("fraudgate_cases_outbox_records"), "waiting"),
        ),
        Panel(
            "Outbox delivered, records unreadable",
            "What Kafka acknowledged, and what can't be read from it and was left out.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_cases_outbox_delivered_total"), "delivered"),
                Query(rate("fraudgate_cases_unreadable_total", "topic"), "unreadable: {{topic}}"),
            ),
        ),
        Panel(
            "Webhooks: waiting",
            "Messages by webhook. Growing: its receiver is slow or away.",
            Unit.COUNT,
            one(total("fraudgate_webhook_queue", "webhook"), "{{webhook}}"),
        ),
        Panel(
            "Webhooks: delivered and failed attempts",
            "By webhook. A failed attempt is tried again.",
            Unit.PER_SECOND,
            (
                Query(rate("fraudgate_webhook_delivered_total", "webhook"), "delivered {{webhook}}"),
                Query(rate("fraudgate_webhook_failed_total", "webhook"), "failed {{webhook}}"),
                Query(rate("fraudgate_webhook_queued_total", "webhook"), "queued {{webhook}}"),
            ),
        ),
        Panel(
            "Webhooks: not delivered",
            "In the last hour. dead: given up after the last attempt. overflow: the queue was full. old: too old to send. repeated: told"
            " already.",
            Unit.COUNT,
            (
                Query("sum by (webhook) (increase(fraudgate_webhook_dead_total[1h]))", "dead {{webhook}}"),
                Query("sum by (webhook) (increase(fraudgate_webhook_overflow_total[1h]))", "overflow {{webhook}}"),
                Query("sum by (webhook) (increase(fraudgate_webhook_old_total[1h]))", "old {{webhook}}"),
                Query("sum by (webhook) (increase(fraudgate_webhook_duplicate_total[1h]))", "repeated {{webhook}}"),
            ),
            limits=((0.5, Colour.BAD),),
        ),
    ),
)

BOARD = Board(
    "fraudgate-policy",
    "Fraudgate: policy and cases",
    "What people steer by policy and lists, and what they do: reviews, labels, webhooks.",
    (POLICY, LISTS, REVIEWS, SERVICE),
)
