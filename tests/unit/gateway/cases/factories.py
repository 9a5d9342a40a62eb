"""What the case service's tests build: a service without Kafka on a database of its own, and a caller of its routes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI

from gateway.cases import reviews
from gateway.cases.app import make_app
from gateway.cases.errors import KafkaUnavailableError
from gateway.cases.intake import review_of
from gateway.cases.policy_view import PolicyView
from gateway.cases.service import CaseService, now_ms
from gateway.contracts.decision import Outcome, Receipt
from gateway.contracts.lists import ListChange
from gateway.contracts.settings import Settings
from gateway.kafka.avro import encode_receipt, receipt_fields
from gateway.kafka.records import Record
from gateway.policy.document import AlertRoute, ListDeclaration, ListKind
from tests.integration.test_jobs import make_receipt
from tests.unit.gateway.factories import make_transaction

CARD_NUMBER = "4111111111111111"
VIEW = PolicyView(
    digest="d" * 64,
    lists={
        list_id: ListDeclaration(id=list_id, field=field, kind=kind, owner="risk", text=text)
        for list_id, field, kind, text in (
            ("blocked-cards", "card_id", ListKind.BLOCK, "Cards in other hands."),
            ("watched-cards", "card_id", ListKind.WATCH, "Cards to look at."),
            ("blocked-mccs", "mcc", ListKind.BLOCK, "Kinds of merchants."),
        )
    },
    watched=frozenset({"watched-cards"}),
    routes=(AlertRoute(name="declines", outcomes=[Outcome.DECLINE], webhooks=["desk"]),),
    texts={"velocity": "many payments in five minutes"},
)


class FakePublisher:
    """Stands for Kafka's acknowledgement of list changes; `down` is an outage."""

    def __init__(self) -> None:
        self.sent: list[ListChange] = []
        self.down = False

    def send(self, change: ListChange) -> int:
        if self.down:
            raise KafkaUnavailableError
        self.sent.append(change)
        return len(self.sent)


@contextmanager
def a_service(home: Path, **settings: Any) -> Iterator[tuple[CaseService, FastAPI]]:
    """Without its threads: what would go to Kafka stays in the outbox."""
    service = CaseService(Settings(home=str(home), registry_url="http://127.0.0.1:1", **settings))
    service.policy.view = VIEW
    service.publisher = FakePublisher()  # type: ignore[assignment]
    try:
        yield service, make_app(service)
    finally:
        service.database.close()


def receipt(transaction_id: str = "t1", outcome: Outcome = Outcome.REVIEW, **changes: Any) -> dict[str, Any]:
    """A receipt's fields; what isn't one of its own goes to its transaction."""
    own = {name: changes.pop(name) for name in list(changes) if name in Receipt.__struct_fields__}
    made = make_receipt(make_transaction(transaction_id, **({"event_time_ms": now_ms() - 5000} | changes)), outcome)
    return receipt_fields(encode_receipt(msgspec.structs.replace(made, **({"decided_at_ms": now_ms()} | own))))


def queue(service: CaseService, *receipts: dict[str, Any]) -> None:
    found = [r for r in (review_of(fields, service.policy.view) for fields in receipts) if r is not None]
    service.database.call(lambda c: reviews.add(c, found, now_ms()))


def outbox(service: CaseService) -> list[Record]:
    rows = service.database.call(lambda c: c.execute("select topic, key, payload from outbox order by seq").fetchall())
    return [Record(row["topic"], row["key"], row["payload"]) for row in rows]


async def ask(app: FastAPI, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """(status, decoded JSON, headers) of one call. Underscores in the names of headers stand for hyphens."""
    path, _, query = path.partition("?")
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "headers": [
            (b"content-type", b"application/json"),
            *((k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    sent: list[Any] = []
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    content = b"".join(m.get("body", b"") for m in sent[1:])
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    is_json = "json" in found.get("content-type", "")
    return sent[0]["status"], json.loads(content) if is_json and content else content, found
