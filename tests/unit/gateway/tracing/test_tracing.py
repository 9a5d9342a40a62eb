"""Which decisions are traced, what their spans say, and that nothing about it can cost a decision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Proto
from opentelemetry.proto.trace.v1.trace_pb2 import Status as ProtoStatus

from deploy.ports import free_ports
from gateway.contracts.routing import point_of, salt_of
from gateway.contracts.settings import Settings
from gateway.kafka.records import decision_records
from gateway.metrics import Metrics
from gateway.scoring.job import Job, Result, Verdict, requests_of
from gateway.tracing.export import Exporter, open_tracer
from gateway.tracing.trace import Steps, accepted, accepted_of, is_sampled
from gateway.tracing.tracer import SEND_MAX, Finished, Tracer
from tests.helpers import wait_until
from tests.otlp import Collector, collector
from tests.unit.gateway.factories import NOW_MS, decided, make_job, make_transaction

CALLERS = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = CALLERS[:-2] + b"00"
# By `printf %s ID | md5sum`, as the page says.
MD5_OF_SILENT = bytes.fromhex("73be252ca82217b1458a25e6b4e99f15")
MD5_OF_T_KAFKA = bytes.fromhex("41cb00a10f5044eab76322b0ca60006f")
STEPS = Steps(1.0, 1.010, 1.015, 1.016, 1.016, asked=True, observed=True, rows=3, policy_digest="digest", lists_version=4)


class Kept:
    """Stands for a collector: keeps what it is sent, or takes nothing."""

    def __init__(self, takes: bool = True) -> None:
        self.sent: list[Finished] = []
        self.takes = takes

    def __call__(self, finished: Sequence[Finished]) -> bool:
        if self.takes:
            self.sent += finished
        return self.takes


def make_tracer(
    export: Callable[[Sequence[Finished]], bool] | None = None,
    metrics: Metrics | None = None,
    *,
    share: float = 0.0,
    per_s: int = 1000,
    waiting: int = 1000,
    clock_s: Callable[[], float] = lambda: 10.0,
) -> Tracer:
    return Tracer(
        metrics or Metrics(),
        export or Kept(),
        sample_share=share,
        per_s_max=per_s,
        waiting_max=waiting,
        clock_s=clock_s,
        wall_clock_ns=lambda: NOW_MS * 1_000_000,
    )


def results_of(jobs: Sequence[Job]) -> list[Result]:
    return [decided(job) for job in jobs]


def sample(tracer: Tracer, results: Sequence[Result], steps: Steps = STEPS) -> list[str]:
    """The transactions that are traced."""
    tracer.sample(requests_of([r.job for r in results]), np.arange(len(results)), results, steps)
    return [r.job.transaction_id for r in results if r.trace is not None]


def counted(metrics: Metrics, outcome: str) -> float:
    return metrics.registry.get_sample_value("fraudgate_traces_total", {"outcome": outcome}) or 0.0


@pytest.fixture
def receiver() -> Iterator[Collector]:
    with collector() as found:
        yield found


def test_the_same_share_of_transactions_is_traced_in_every_run() -> None:
    names = [f"t-{i}" for i in range(5000)]
    found = [
        sample(make_tracer(share=0.02, per_s=10_000), results_of([make_job(make_transaction(n)) for n in names])) for _ in "ab"
    ]
    assert found[0] == found[1]
    assert found[0] == [n for n in names if point_of(n.encode(), salt_of("trace", "1")) < 0.02]
    assert 70 <= len(found[0]) <= 130


def test_nothing_is_traced_at_a_share_of_nothing() -> None:
    assert sample(make_tracer(), results_of([make_job(make_transaction(f"t-{i}")) for i in range(500)])) == []


def test_what_its_caller_traces_is_traced_and_what_it_does_not_is_not() -> None:
    jobs = [make_job(make_transaction(n)) for n in ("sampled", "unsampled", "silent")]
    jobs[0].traceparent, jobs[1].traceparent = CALLERS, UNSAMPLED
    results = results_of(jobs)
    assert sample(make_tracer(share=1.0), results) == ["sampled", "silent"]
    theirs, ours = results[0].trace, results[2].trace
    assert theirs is not None
    assert ours is not None
    assert (theirs.trace_id.hex(), theirs.parent_id and theirs.parent_id.hex()) == (
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "00f067aa0ba902b7",
    )
    assert (ours.trace_id, ours.parent_id) == (MD5_OF_SILENT, None)
    assert ours.span_id != theirs.span_id


def test_the_receipt_goes_on_with_the_decisions_span_and_a_trace_that_is_not_ours_passes_through() -> None:
    jobs = [make_job(make_transaction(n)) for n in ("traced", "passing", "plain")]
    jobs[0].traceparent, jobs[1].traceparent = CALLERS, UNSAMPLED
    results = results_of(jobs)
    sample(make_tracer(), results)
    trace = results[0].trace
    assert trace is not None
    headers = [record.headers for record in decision_records(results)]
    own = f"00-4bf92f3577b34da6a3ce929d0e0e4736-{trace.span_id.hex()}-01".encode()
    assert headers == [(("traceparent", own),), (("traceparent", UNSAMPLED),), ()]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        CALLERS.upper(),
        CALLERS[:-1],
        CALLERS + b"-more",
        CALLERS + b"0",
        b"ff" + CALLERS[2:],
        b"00-" + b"0" * 32 + CALLERS[35:],
        CALLERS[:36] + b"0" * 16 + CALLERS[52:],
        b"\xff" * 55,
        CALLERS + b"\n",
    ],
)
def test_a_malformed_context_is_none(value: bytes) -> None:
    assert accepted(value) is None


def test_a_context_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert accepted(b"01" + CALLERS[2:] + b"-more") == b"01" + CALLERS[2:] + b"-more"
    assert is_sampled(b"01" + CALLERS[2:-2] + b"03-more")
    assert not is_sampled(UNSAMPLED)
    assert accepted_of([("other", None), ("traceparent", CALLERS)]) == CALLERS
    assert accepted_of([("traceparent", None)]) is accepted_of([("other", CALLERS)]) is None


def test_one_more_than_may_be_traced_a_second_is_not_and_goes_on_as_it_came() -> None:
    now_s, metrics = 10.0, Metrics()
    tracer = make_tracer(metrics=metrics, per_s=3, clock_s=lambda: now_s)

    def ask(count: int) -> int:
        jobs = [make_job(make_transaction(f"t-{i}")) for i in range(count)]
        for job in jobs:
            job.traceparent = CALLERS
        results = results_of(jobs)
        traced = len(sample(tracer, results))
        assert [job.traceparent == CALLERS for job in jobs] == [False] * traced + [True] * (count - traced)
        return traced

    assert (ask(4), ask(1)) == (3, 0)
    assert counted(metrics, "over_limit") == 2
    now_s = 10.5
    assert ask(5) == 1
    now_s = 1000.0
    assert ask(5) == 3


def test_one_more_than_may_wait_is_dropped_and_counted() -> None:
    kept, metrics = Kept(), Metrics()
    tracer = make_tracer(kept, metrics, share=1.0, waiting=5)
    results = results_of([make_job(make_transaction(f"t-{i}")) for i in range(6)])
    sample(tracer, results)
    tracer.finish(results, 1.02, 1.03)
    assert counted(metrics, "dropped") == 1
    assert metrics.registry.get_sample_value("fraudgate_traces_waiting") == 5
    assert tracer.send()
    assert [f.result.job.transaction_id for f in kept.sent] == [f"t-{i}" for i in range(5)]
    assert (counted(metrics, "sent"), metrics.registry.get_sample_value("fraudgate_traces_waiting")) == (5, 0)
    tracer.finish(results, 1.02, 1.03)
    assert counted(metrics, "dropped") == 2


def test_what_is_not_traced_never_waits() -> None:
    kept = Kept()
    tracer = make_tracer(kept)
    results = [*results_of([make_job()]), Result(make_job(), Verdict.CONFLICT)]
    sample(tracer, results[:1])
    tracer.finish(results, 1.02, 1.03)
    tracer.send()
    assert kept.sent == []


def test_a_decision_over_http_is_a_tree_with_every_step_in_its_place(receiver: Collector) -> None:
    job = make_job(make_transaction("t-http"))
    job.received_s, job.traceparent = 0.999, CALLERS
    results = results_of([job])
    exporter = Exporter(receiver.url, "1.2.3", "gw-7")
    tracer = make_tracer(exporter.send)
    sample(tracer, results)
    tracer.finish(results, 1.017, 1.018)
    assert tracer.send()
    root, children = receiver.decision("t-http")
    assert root.trace.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert root.parent.hex() == "00f067aa0ba902b7"
    assert root.kind == Proto.SPAN_KIND_SERVER
    assert root.resource["service.name"] == "fraudgate-gateway"
    assert (root.resource["service.version"], root.resource["service.instance.id"]) == ("1.2.3", "gw-7")
    # The clocks said 10 s and NOW_MS when it was finished.
    base_ns = NOW_MS * 1_000_000 - 10_000_000_000
    assert [(s.name, s.start_ns - base_ns, s.end_ns - base_ns) for s in (root, *children.values())] == [
        ("decision", 999_000_000, 1_018_000_000),
        ("admit", 999_000_000, 1_000_000_000),
        ("features", 1_000_000_000, 1_010_000_000),
        ("policy", 1_015_000_000, 1_016_000_000),
        ("publish", 1_017_000_000, 1_018_000_000),
    ]
    assert root.attributes == {
        "fraudgate.transaction_id": "t-http",
        "fraudgate.door": "http",
        "fraudgate.decision": "approve",
        "fraudgate.risk_score": 1,
        "fraudgate.probability": 0.001,
        "fraudgate.reasons": [],
        "fraudgate.rule_hits": [],
        "fraudgate.degraded": [],
        "fraudgate.policy_digest": "digest",
        "fraudgate.lists_version": 4,
        "fraudgate.batch_rows": 3,
        "http.request.method": "POST",
        "url.path": "/score",
        "http.response.status_code": 200,
    }


def test_a_decision_from_kafka_begins_with_its_record_and_says_where_it_lies(receiver: Collector) -> None:
    job = make_job(make_transaction("t-kafka"), offset=7)
    job.received_s, job.arrived_ms = 0.999, job.received_ms - 250
    late = Steps(1.0, 1.040, 1.041, 1.042, 1.060, asked=True, observed=False, rows=1, policy_digest="d", lists_version=-1)
    results = results_of([job])
    tracer = make_tracer(Exporter(receiver.url, "1", "0").send, share=1.0)
    sample(tracer, results, late)
    tracer.finish(results, 1.061, 1.071)
    assert tracer.send()
    root, children = receiver.decision("t-kafka")
    assert (root.kind, root.parent, root.trace) == (Proto.SPAN_KIND_CONSUMER, b"", MD5_OF_T_KAFKA)
    assert list(children) == ["topic", "admit", "features", "policy", "reasons", "commit"]
    assert (root.start_ns, root.end_ns) == (children["topic"].start_ns, children["commit"].end_ns)
    assert children["topic"].end_ns - children["topic"].start_ns == 250_000_000
    assert children["features"].status == ProtoStatus.STATUS_CODE_ERROR
    assert (root.attributes["messaging.destination.partition.id"], root.attributes["messaging.kafka.offset"]) == ("0", 7)


def test_a_record_whose_clock_is_ahead_of_ours_does_not_begin_after_its_end() -> None:
    job = make_job(make_transaction("ahead"), offset=1)
    job.received_s, job.arrived_ms = 1.0, job.received_ms + 60_000
    [result] = results_of([job])
    sample(make_tracer(share=1.0), [result])
    assert result.trace is not None
    own, *steps = Exporter("http://127.0.0.1:1", "1", "0").spans_of(Finished(result.trace, result, 1.02, 1.03, 0))
    assert own.start_time == steps[0].start_time == steps[0].end_time == 1_000_000_000


def test_spans_say_how_and_never_about_whom(receiver: Collector) -> None:
    tokens = {
        "card_id": "secret-card",
        "customer_id": "secret-customer",
        "merchant_id": "secret-merchant",
        "device_id": "secret-device",
        "ip": "secret-ip",
        "card_bin": "41111111",
    }
    jobs = [make_job(make_transaction("t-1", **tokens)), make_job(make_transaction("t-2", **tokens), offset=3)]
    results = results_of(jobs)
    tracer = make_tracer(Exporter(receiver.url, "1", "0").send, share=1.0)
    sample(tracer, results)
    tracer.finish(results, 1.02, 1.03)
    assert tracer.send()
    said = repr(receiver.spans)
    assert len(receiver.spans) == 11
    assert "t-1" in said
    assert not [token for token in tokens.values() if token in said]


def test_more_than_one_call_holds_goes_in_several(receiver: Collector) -> None:
    metrics = Metrics()
    tracer = make_tracer(Exporter(receiver.url, "1", "0").send, metrics, share=1.0)
    results = results_of([make_job(make_transaction(f"t-{i}")) for i in range(SEND_MAX + 1)])
    sample(tracer, results)
    tracer.start()
    tracer.finish(results, 1.02, 1.03)
    wait_until(lambda: counted(metrics, "sent") == SEND_MAX + 1, 20, "all traces are sent")
    tracer.stop()
    assert receiver.calls == 2
    assert len(receiver.traces()) == SEND_MAX + 1


def test_what_waits_is_sent_at_the_end(receiver: Collector) -> None:
    metrics = Metrics()
    tracer = make_tracer(Exporter(receiver.url, "1", "0").send, metrics, share=1.0)
    results = results_of([make_job(make_transaction(f"t-{i}")) for i in range(3)])
    sample(tracer, results)
    tracer.start()
    tracer.finish(results, 1.02, 1.03)
    tracer.stop()
    assert counted(metrics, "sent") == 3
    assert len(receiver.traces()) == 3


def test_traces_that_a_collector_refuses_are_counted_and_the_next_are_taken(receiver: Collector) -> None:
    metrics = Metrics()
    tracer = make_tracer(Exporter(receiver.url, "1", "0").send, metrics, share=1.0)
    results = results_of([make_job(make_transaction("t-1"))])
    sample(tracer, results)
    receiver.status = 400
    tracer.finish(results, 1.02, 1.03)
    assert not tracer.send()
    receiver.status = 200
    tracer.finish(results, 1.02, 1.03)
    assert tracer.send()
    assert (counted(metrics, "failed"), counted(metrics, "sent")) == (1, 1)


def test_the_doors_never_wait_for_a_collector_that_hangs() -> None:
    hanging, entered, metrics = threading.Event(), threading.Event(), Metrics()

    def hang(_: Sequence[Finished]) -> bool:
        entered.set()
        return hanging.wait(30)

    tracer = make_tracer(hang, metrics, share=1.0, waiting=4)
    results = results_of([make_job(make_transaction(f"t-{i}")) for i in range(4)])
    sample(tracer, results)
    tracer.start()
    tracer.finish(results, 1.02, 1.03)
    assert entered.wait(20)
    tracer.finish(results, 1.02, 1.03)
    tracer.finish(results, 1.02, 1.03)
    assert counted(metrics, "dropped") == 4
    hanging.set()
    tracer.stop()
    assert counted(metrics, "sent") == 8


def test_a_bug_in_the_making_of_spans_costs_those_traces_alone() -> None:
    metrics, kept = Metrics(), Kept()
    broken = True

    def export(finished: Sequence[Finished]) -> bool:
        if broken:
            raise ValueError("a bug")
        return kept(finished)

    tracer = make_tracer(export, metrics, share=1.0)
    results = results_of([make_job(make_transaction("t-1"))])
    sample(tracer, results)
    tracer.finish(results, 1.02, 1.03)
    assert not tracer.send()
    broken = False
    tracer.finish(results, 1.02, 1.03)
    assert tracer.send()
    assert (counted(metrics, "failed"), len(kept.sent)) == (1, 1)


def test_a_collector_that_is_not_there_costs_its_traces() -> None:
    [port] = free_ports(1)
    metrics = Metrics()
    tracer = make_tracer(Exporter(f"http://127.0.0.1:{port}", "1", "0", timeout_s=0.2).send, metrics, share=1.0)
    results = results_of([make_job(make_transaction("t-1"))])
    sample(tracer, results)
    tracer.finish(results, 1.02, 1.03)
    assert not tracer.send()
    assert counted(metrics, "failed") == 1


def test_without_a_collector_there_is_no_tracer() -> None:
    assert open_tracer(Settings(), Metrics(), "1") is None
    assert open_tracer(Settings(trace_url="http://127.0.0.1:4318/"), Metrics(), "1") is not None
