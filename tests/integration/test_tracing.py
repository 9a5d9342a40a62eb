"""Traces of a real gateway, decoded by a collector: from both doors, joined to their callers', and gone without a trace of trouble when
the collector is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.stack import Stack
from gateway.contracts.routing import point_of, salt_of
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS
from gateway.contracts.transaction import Transaction, encode_json
from tests.helpers import RunningCommand, running_command, wait_until
from tests.integration.gateway_helpers import (
    Decisions,
    Tail,
    gateway_of_its_own,
    make_transaction,
    name,
    produce,
    ready_without,
    request,
)
from tests.otlp import Collector, Span, collector
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
STEPS = {"admit", "features", "model", "policy", "reasons"}


@dataclasses.dataclass
class Served:
    settings: Settings
    gateway: RunningCommand


@pytest.fixture(scope="module")
def receiver() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def served(stack: Stack, settings: Settings, receiver: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running gateway that traces what its callers trace, and half of the rest."""
    folder = tmp_path_factory.mktemp("traces")
    write_model(folder / "models")
    own = dataclasses.replace(
        gateway_of_its_own(settings, folder, "traces"),
        trace_url=receiver.url,
        trace_sample_permille=500,
        trace_waiting_max=10,
    )
    with running_command(own, "serve", log_path=folder / "gateway.log") as command:
        command.wait_until(lambda: ready_without(own, "redis", "model", "kafka"), 60, "the gateway is ready")
        yield Served(own, command)


def post(settings: Settings, t: Transaction, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(settings.host, settings.gateway_port, timeout=30)
    try:
        connection.request("POST", "/score", encode_json(t), headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def named(prefix: str, *, sampled: bool) -> str:
    """A new transaction_id whose hash lies in the sampled half, or doesn't."""
    return next(n for _ in range(100) if (point_of((n := name(prefix)).encode(), salt_of("trace", "1")) < 0.5) is sampled)


def counted(settings: Settings, outcome: str) -> float:
    connection = http.client.HTTPConnection(settings.host, settings.gateway_port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        found = re.search(rf'^fraudgate_traces_total{{outcome="{outcome}"}} (\S+)$', connection.getresponse().read().decode(), re.M)
        return 0.0 if found is None else float(found[1])
    finally:
        connection.close()


def check_tree(root: Span, children: dict[str, Span]) -> None:
    """The steps lie within the decision, one after the other, and the whole of it is not long ago."""
    steps = sorted(children.values(), key=lambda span: span.start_ns)
    assert root.start_ns <= steps[0].start_ns
    assert steps[-1].end_ns <= root.end_ns + 1000
    assert all(0 <= span.start_ns <= span.end_ns for span in steps)
    assert all(before.end_ns <= after.start_ns + 1000 for before, after in zip(steps, steps[1:], strict=False))
    assert abs(root.end_ns / 1e9 - time.time()) < 60


def test_a_callers_trace_over_http_is_joined_and_goes_on_with_the_receipt(served: Served, receiver: Collector) -> None:
    settings = served.settings
    decisions = Decisions(settings)
    t, silent = make_transaction(name("traced")), make_transaction(named("silent", sampled=False))
    assert post(settings, silent)[0] == 200
    status, answer = post(settings, t, traceparent=TRACEPARENT)
    assert status == 200
    root, children = receiver.decision(t.transaction_id)
    assert (root.trace.hex(), root.parent.hex()) == (TRACE, CALLER)
    assert set(children) == STEPS | {"publish"}
    check_tree(root, children)
    readyz = request(settings, "GET", "/readyz")[1]
    told = {key.removeprefix("fraudgate."): value for key, value in root.attributes.items()}
    assert told["door"] == "http"
    fields = ("decision", "risk_score", "probability", "degraded", "rule_hits")
    assert [told[field] for field in fields] == [answer[field] for field in fields]
    assert told["batch_rows"] == 1
    assert (told["model_name"], told["model_version"], told["model_route"]) == ("fraudgate", "1", "champion")
    assert told["policy_digest"] == readyz["policy"]["digest"]
    assert root.resource["service.instance.id"] == settings.instance_id
    decisions.of([t.transaction_id, silent.transaction_id])
    headers = {(m.key() or b"").decode(): m.headers() for m in decisions.messages}
    decisions.close()
    assert headers[t.card_id] == [("traceparent", f"00-{TRACE}-{root.id.hex()}-01".encode())]
    assert not headers[silent.card_id]
    assert [s for s in receiver.spans if s.attributes.get("fraudgate.transaction_id") == silent.transaction_id] == []


def test_a_callers_trace_in_kafka_is_joined_and_goes_on_with_the_receipt(served: Served, receiver: Collector) -> None:
    tail = Tail(served.settings, DECISIONS)
    t = make_transaction(name("topic"))
    produce(served.settings, [(t.card_id, encode_json(t))], [("traceparent", TRACEPARENT.encode())])
    root, children = receiver.decision(t.transaction_id)
    assert (root.trace.hex(), root.parent.hex()) == (TRACE, CALLER)
    assert set(children) == STEPS | {"topic", "commit"}
    check_tree(root, children)
    assert root.start_ns == children["topic"].start_ns
    assert root.attributes["messaging.destination.name"] == "transactions"
    tail.read_until(lambda: any(m.key() == t.card_id.encode() for m in tail.messages))
    [headers] = [m.headers() for m in tail.messages if m.key() == t.card_id.encode()]
    tail.close()
    assert headers == [("traceparent", f"00-{TRACE}-{root.id.hex()}-01".encode())]


def test_a_sampled_transaction_has_a_trace_that_its_id_names(served: Served, receiver: Collector) -> None:
    t = make_transaction(named("own", sampled=True))
    assert post(served.settings, t)[0] == 200
    root, children = receiver.decision(t.transaction_id)
    assert (root.trace, root.parent) == (hashlib.md5(t.transaction_id.encode(), usedforsecurity=False).digest(), b"")
    assert set(children) == STEPS | {"publish"}


def test_without_its_collector_a_gateway_decides_as_before(served: Served, receiver: Collector) -> None:
    settings = served.settings
    receiver.status = 503
    before = len(receiver.spans)
    try:
        for _ in range(40):
            status, answer = post(settings, make_transaction(name("away")), traceparent=TRACEPARENT)
            assert status == 200
            assert not {"request_only", "rules_only", "static_policy"} & set(answer["degraded"])
        wait_until(lambda: counted(settings, "failed") and counted(settings, "dropped"), 60, "traces are given up")
    finally:
        receiver.status = 200
    assert len(receiver.spans) == before
    sent = counted(settings, "sent")
    assert post(settings, make_transaction(name("back")), traceparent=TRACEPARENT)[0] == 200
    wait_until(lambda: counted(settings, "sent") > sent, 60, "the collector takes traces again")
    assert served.gateway.log().count("doesn't take traces") == 1
