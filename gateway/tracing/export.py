"""Spans of traced decisions, and how they are sent: by OpenTelemetry's own exporter, as OTLP in protobuf over HTTP.

Runs in the thread of `gateway.tracing.tracer`. Spans are made from the times that the doors and the scorer took anyway, so nothing here was
on the way of a decision: no tracer of the SDK, no context, no current span. A span says how a decision came about and never about whom: no
token of a card, customer, merchant, device or address. The SDK's variables hold: OTEL_EXPORTER_OTLP_HEADERS for a collector that asks for a
key, OTEL_EXPORTER_OTLP_COMPRESSION, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes

from gateway.contracts.decision import Door
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, TRANSACTIONS
from gateway.metrics import Metrics
from gateway.tracing.tracer import Finished, Tracer

TRACES_PATH = "/v1/traces"
SERVICE = "fraudgate-gateway"
# For one call, repeats included.
TIMEOUT_S = 5.0
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)
_NO_REPLY = Status(StatusCode.ERROR, "Redis didn't answer in time")
_REDIS: Attributes = {"db.system.name": "redis"}
_TO_KAFKA: Attributes = {"messaging.system": "kafka", "messaging.destination.name": DECISIONS}

# name, start, end (time.monotonic()), kind, attributes, status
_Step = tuple[str, float, float, SpanKind, Attributes, Status]


def open_tracer(settings: Settings, metrics: Metrics, version: str) -> Tracer | None:
    """What the settings ask for, not started; None where no collector is named. `version` is the code's."""
    if not settings.trace_url:
        return None
    return Tracer(
        metrics,
        Exporter(settings.trace_url, version, settings.instance_id).send,
        sample_share=settings.trace_sample_permille / 1000,
        per_s_max=settings.trace_per_s_max,
        waiting_max=settings.trace_waiting_max,
    )


class Exporter:
    """`url` is the collector's root, `http://host:4318`; `service_instance` tells this process from others. Called in one thread."""

    def __init__(self, url: str, version: str, service_instance: str, timeout_s: float = TIMEOUT_S) -> None:
        self._otlp = OTLPSpanExporter(endpoint=url.rstrip("/") + TRACES_PATH, timeout=timeout_s)
        self._resource = Resource.create(
            {"service.name": SERVICE, "service.version": version, "service.instance.id": service_instance}
        )
        self._scope = InstrumentationScope("fraudgate", version)

    def send(self, finished: Sequence[Finished]) -> bool:
        """True when the collector has them."""
        spans = [span for decision in finished for span in self.spans_of(decision)]
        return self._otlp.export(spans) is SpanExportResult.SUCCESS

    def spans_of(self, decision: Finished) -> list[ReadableSpan]:
        """The decision's own span and those of its steps."""
        trace, result = decision.trace, decision.result
        trace_id = int.from_bytes(trace.trace_id, "big")
        own = _context(trace_id, trace.span_id, is_remote=False)
        caller = None if trace.parent_id is None else _context(trace_id, trace.parent_id, is_remote=True)
        kind = SpanKind.SERVER if result.job.door is Door.HTTP else SpanKind.CONSUMER
        steps = [
            self._span(
                decision,
                name,
                _context(trace_id, secrets.token_bytes(8), is_remote=False),
                own,
                start_s,
                end_s,
                kind_,
                told,
                status,
            )
            for name, start_s, end_s, kind_, told, status in _steps(decision)
        ]
        return [
            self._span(
                decision, "decision", own, caller, _begun_s(decision), decision.ended_s, kind, _attributes(decision), _UNSET
            ),
            *steps,
        ]

    def _span(
        self,
        decision: Finished,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        start_s: float,
        end_s: float,
        kind: SpanKind,
        attributes: Attributes,
        status: Status,
    ) -> ReadableSpan:
        return ReadableSpan(
            name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=status,
            start_time=decision.wall_ns + round(start_s * 1e9),
            end_time=decision.wall_ns + round(end_s * 1e9),
            instrumentation_scope=self._scope,
        )


def _context(trace_id: int, span_id: bytes, *, is_remote: bool) -> SpanContext:
    return SpanContext(trace_id, int.from_bytes(span_id, "big"), is_remote, _SAMPLED)


def _begun_s(decision: Finished) -> float:
    """When the decision was asked for: at arrival, over Kafka at the producer's time, whatever its clock says not after we read it."""
    job = decision.result.job
    return job.received_s - max(0, job.received_ms - job.arrived_ms) / 1000


def _steps(decision: Finished) -> Iterator[_Step]:
    job, answer, at = decision.result.job, decision.result.answer, decision.trace.steps
    assert answer is not None, "what was decided has an answer"
    if job.door is Door.KAFKA:
        yield "topic", _begun_s(decision), job.received_s, SpanKind.INTERNAL, None, _UNSET
    yield "admit", job.received_s, at.started_s, SpanKind.INTERNAL, None, _UNSET
    if at.asked:
        yield "features", at.started_s, at.observed_s, SpanKind.CLIENT, _REDIS, _UNSET if at.observed else _NO_REPLY
    if answer.model is not None:
        yield "model", at.observed_s, at.modelled_s, SpanKind.INTERNAL, None, _UNSET
    yield "policy", at.modelled_s, at.decided_s, SpanKind.INTERNAL, None, _UNSET
    if at.explained_s > at.decided_s:
        yield "reasons", at.decided_s, at.explained_s, SpanKind.INTERNAL, None, _UNSET
    # Over HTTP the local log, or Kafka where it can't be written.
    name = "publish" if job.door is Door.HTTP else "commit"
    yield name, decision.handed_s, decision.ended_s, SpanKind.PRODUCER, _TO_KAFKA, _UNSET


def _attributes(decision: Finished) -> Attributes:
    job, answer, at = decision.result.job, decision.result.answer, decision.trace.steps
    assert answer is not None, "what was decided has an answer"
    found: dict[str, str | int | float | Sequence[str]] = {
        "fraudgate.transaction_id": answer.transaction_id,
        "fraudgate.door": job.door.value,
        "fraudgate.decision": answer.decision.value,
        "fraudgate.risk_score": answer.risk_score,
        "fraudgate.reasons": [reason.code for reason in answer.reasons],
        "fraudgate.rule_hits": answer.rule_hits,
        "fraudgate.degraded": answer.degraded,
        "fraudgate.policy_digest": at.policy_digest,
        "fraudgate.lists_version": at.lists_version,
        "fraudgate.batch_rows": at.rows,
    }
    if answer.probability is not None:
        found["fraudgate.probability"] = answer.probability
    if answer.model is not None:
        found["fraudgate.model_name"] = answer.model.name
        found["fraudgate.model_version"] = answer.model.version
        found["fraudgate.model_route"] = answer.model.route
    if job.door is Door.HTTP:
        return found | {"http.request.method": "POST", "url.path": "/score", "http.response.status_code": 200}
    assert job.partition is not None, "what came by Kafka has a place there"
    assert job.offset is not None, "what came by Kafka has a place there"
    return found | {
        "messaging.system": "kafka",
        "messaging.destination.name": TRANSACTIONS,
        "messaging.destination.partition.id": str(job.partition),
        "messaging.kafka.offset": job.offset,
    }
