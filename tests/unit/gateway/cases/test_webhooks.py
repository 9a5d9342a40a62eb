"""Webhooks against real local receivers: signatures, retries, dead letters, duplicates, and receivers that hang."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy.ports import free_ports
from gateway.cases import webhook_queue
from gateway.cases.database import Database
from gateway.cases.errors import NotFoundError
from gateway.cases.metrics import CaseMetrics
from gateway.cases.service import now_ms
from gateway.cases.webhook_file import SECRETS_MAX, WEBHOOKS_MAX, WebhookFileError, key_of, load_webhooks, signatures
from gateway.cases.webhook_queue import Told, WebhookQueue
from gateway.cases.webhooks import BACKOFF_MAX_S, Deliverer, Delivering, pause_ms
from tests.helpers import until

pytestmark = pytest.mark.anyio

OLD, NEW = ("whsec_" + base64.b64encode(bytes([i]) * 32).decode() for i in (1, 2))
DEADLINE_S = 20.0


@dataclass
class Receiver:
    """A real HTTP server. `answers` are the statuses to give, the last one for ever; 0 hangs."""

    answers: list[int] = field(default_factory=lambda: [200])
    port: int = 0
    headers: str = ""
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while line := await reader.readline():
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers["content-length"]))
                self.requests.append((headers, body))
                status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if status == 0:
                    # Until the caller gives up.
                    await reader.read()
                    break
                writer.write(f"HTTP/1.1 {status} x\r\n{self.headers}content-length: 0\r\n\r\n".encode())
                await writer.drain()
        writer.close()


@asynccontextmanager
async def listening(receiver: Receiver) -> AsyncIterator[Receiver]:
    server = await asyncio.start_server(receiver.handle, "127.0.0.1", receiver.port)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for writer in receiver.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class Sender:
    """A deliverer on a database, as the service makes it."""

    def __init__(self, folder: Path, ports: dict[str, int], **bounds: Any) -> None:
        self.path = folder / "webhooks.json"
        self.write(ports)
        self.metrics = CaseMetrics()
        values: dict[str, Any] = {"timeout_s": 0.5, "attempts_max": 20, "first_ms": 20, "retry_max_ms": 60_000, "concurrency": 2}
        queue = {"queue_max": bounds.pop("queue_max", 100), "dedup_window_ms": 60_000, "age_max_ms": 600_000}
        self.database = Database(folder / "cases.sqlite")
        self.queue = WebhookQueue(load_webhooks(str(self.path)), self.metrics, **queue)
        self.deliverer = Deliverer(
            self.database, self.queue, self.metrics, Delivering(**(values | bounds)), str(self.path), now_ms=now_ms
        )

    def write(self, ports: dict[str, int], secrets: tuple[str, ...] = (NEW,)) -> None:
        hooks = [{"name": n, "url": f"http://127.0.0.1:{p}/in", "secrets": list(secrets)} for n, p in ports.items()]
        self.path.write_text(json.dumps({"webhooks": hooks}))

    def tell(self, webhook: str, subject: str, at_ms: int | None = None, kind: str = "decision") -> int:
        told = Told(webhook, kind, subject, now_ms() if at_ms is None else at_ms, {"transaction_id": subject})
        return self.database.call(lambda c: self.queue.add(c, [told], now_ms()))

    def states(self) -> dict[str, str]:
        rows = self.database.call(lambda c: c.execute("select subject, state from deliveries").fetchall())
        return {row["subject"]: row["state"] for row in rows}

    def count(self, name: str, webhook: str = "desk") -> float:
        return self.metrics.registry.get_sample_value(name, {"webhook": webhook}) or 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.deliverer.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


def verified(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """Standard Webhooks' check, from its text: HMAC-SHA256 over id.timestamp.body with the secret's bytes."""
    signed = headers["webhook-id"].encode() + b"." + headers["webhook-timestamp"].encode() + b"." + body
    wanted = base64.b64encode(hmac.new(base64.b64decode(secret[6:]), signed, hashlib.sha256).digest()).decode()
    versions = [part.split(",", 1) for part in headers["webhook-signature"].split(" ")]
    return any(version == "v1" and hmac.compare_digest(given, wanted) for version, given in versions)


def test_signatures_are_those_of_the_reference_implementation() -> None:
    # The vector of the Standard Webhooks' own libraries.
    key = key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = signatures((key,), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_message_is_signed_with_every_active_secret(tmp_path: Path) -> None:
    async with listening(Receiver()) as receiver:
        sender = Sender(tmp_path, {"desk": receiver.port})
        sender.write({"desk": receiver.port}, (OLD, NEW))
        sender.queue.webhooks = load_webhooks(str(sender.path))
        sender.tell("desk", "t1")
        async with sender.running():
            await until(lambda: sender.states() == {"t1": "delivered"}, DEADLINE_S)
        [(headers, body)] = receiver.requests
        assert verified(OLD, headers, body) and verified(NEW, headers, body)
        assert not verified("whsec_" + base64.b64encode(bytes(32)).decode(), headers, body)
        assert not verified(NEW, headers, body + b" ")
        assert abs(int(headers["webhook-timestamp"]) - now_ms() / 1000) < 60
        assert json.loads(body)["type"] == "fraudgate.decision" and json.loads(body)["data"] == {"transaction_id": "t1"}


async def test_a_receiver_that_is_down_is_tried_until_it_takes_the_message_once(tmp_path: Path) -> None:
    [port] = free_ports(1)
    sender = Sender(tmp_path, {"desk": port})
    sender.tell("desk", "t1")
    async with sender.running():
        await until(lambda: sender.count("fraudgate_webhook_failed_total") >= 2, DEADLINE_S)
        assert sender.states() == {"t1": "waiting"}
        async with listening(Receiver([500, 200], port)) as receiver:
            await until(lambda: sender.states() == {"t1": "delivered"}, DEADLINE_S)
            await until(lambda: sender.count("fraudgate_webhook_delivered_total") == 1, DEADLINE_S)
    # What has not happened is told as 0, so that its first time is an increase.
    quiet = [f"fraudgate_webhook_{name}_total" for name in ("dead", "overflow", "old", "duplicate")]
    assert [sender.metrics.registry.get_sample_value(name, {"webhook": "desk"}) for name in quiet] == [0, 0, 0, 0]
    ids = {headers["webhook-id"] for headers, _ in receiver.requests}
    assert len(receiver.requests) == 2 and len(ids) == 1


async def test_after_the_last_attempt_a_message_is_a_dead_letter_that_can_be_sent_again(tmp_path: Path) -> None:
    async with listening(Receiver([500])) as receiver:
        sender = Sender(tmp_path, {"desk": receiver.port}, attempts_max=3)
        sender.tell("desk", "t1")
        sender.tell("desk", "t2")
        async with sender.running():
            await until(lambda: set(sender.states().values()) == {"dead"}, DEADLINE_S)
            assert len(receiver.requests) == 6
            await until(lambda: sender.count("fraudgate_webhook_dead_total") == 2, DEADLINE_S)
            [first, second], after = sender.database.call(lambda c: webhook_queue.dead_page(c, 50, 0, "desk"))
            assert (first["attempts"], first["failure"], after) == (3, "status 500", None)
            receiver.answers = [200]
            sender.database.call(lambda c: webhook_queue.retry(c, first["id"], now_ms()))
            sender.database.call(lambda c: webhook_queue.discard(c, second["id"]))
            sender.deliverer.wake()
            await until(lambda: sender.states() == {"t1": "delivered"}, DEADLINE_S)
    with pytest.raises(NotFoundError):
        sender.database.call(lambda c: webhook_queue.retry(c, second["id"], now_ms()))


async def test_time_ends_the_attempts_too_and_gone_ends_them_at_once(tmp_path: Path) -> None:
    async with listening(Receiver([500])) as slow, listening(Receiver([410])) as gone:
        sender = Sender(tmp_path, {"desk": slow.port, "gone": gone.port}, retry_max_ms=1, first_ms=100)
        sender.tell("desk", "t1")
        sender.tell("gone", "t2")
        async with sender.running():
            await until(lambda: sender.states() == {"t1": "dead", "t2": "dead"}, DEADLINE_S)
        assert len(slow.requests) == len(gone.requests) == 1


async def test_a_receiver_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    async with listening(Receiver([0])) as hanging, listening(Receiver()) as quick:
        sender = Sender(tmp_path, {"hanging": hanging.port, "quick": quick.port}, timeout_s=60.0)
        for i in range(5):
            sender.tell("hanging", f"h{i}")
        for i in range(20):
            sender.tell("quick", f"q{i}")
        async with sender.running():
            await until(lambda: len(quick.requests) == 20, DEADLINE_S)
            await until(lambda: sum(s == "delivered" for s in sender.states().values()) == 20, DEADLINE_S)
            # No more than its concurrency is under way to it.
            assert len(hanging.requests) == 2


async def test_no_answer_in_time_is_a_failed_attempt(tmp_path: Path) -> None:
    async with listening(Receiver([0])) as receiver:
        sender = Sender(tmp_path, {"desk": receiver.port}, timeout_s=0.05, attempts_max=2)
        sender.tell("desk", "t1")
        async with sender.running():
            await until(lambda: sender.states() == {"t1": "dead"}, DEADLINE_S)
        [[letter], _] = sender.database.call(lambda c: webhook_queue.dead_page(c, 1, 0, None))
        assert letter["failure"] == "no answer within 0.05 s"


async def test_redirects_are_not_followed(tmp_path: Path) -> None:
    async with listening(Receiver()) as inside:
        outside = Receiver([302], headers=f"location: http://127.0.0.1:{inside.port}/metadata\r\n")
        async with listening(outside):
            sender = Sender(tmp_path, {"desk": outside.port}, attempts_max=1)
            sender.tell("desk", "t1")
            async with sender.running():
                await until(lambda: sender.states() == {"t1": "dead"}, DEADLINE_S)
            assert inside.requests == []


async def test_a_duplicate_is_not_sent_twice_and_another_kind_or_subject_is(tmp_path: Path) -> None:
    sender = Sender(tmp_path, {"desk": 1})
    assert [sender.tell("desk", "t1"), sender.tell("desk", "t1"), sender.tell("desk", "t2")] == [1, 0, 1]
    assert sender.tell("desk", "t1", kind="burst") == 1
    assert sender.count("fraudgate_webhook_duplicate_total") == 1
    # What is not defined, or long past, is left out.
    assert sender.tell("nobody", "t1") == 0
    assert sender.tell("desk", "t9", at_ms=now_ms() - 600_001) == 0
    assert sender.count("fraudgate_webhook_old_total") == 1


async def test_what_no_longer_fits_into_a_queue_is_a_dead_letter(tmp_path: Path) -> None:
    sender = Sender(tmp_path, {"desk": 1, "other": 1}, queue_max=2)
    assert [sender.tell("desk", f"t{i}") for i in range(3)] == [1, 1, 0]
    assert sender.tell("other", "t0") == 1
    assert sender.states() | {"t0": "waiting"} == {"t0": "waiting", "t1": "waiting", "t2": "dead"}
    assert sender.count("fraudgate_webhook_overflow_total") == 1


async def test_what_waits_for_a_webhook_that_is_gone_ends_as_a_dead_letter(tmp_path: Path) -> None:
    sender = Sender(tmp_path, {"desk": 1, "other": 1})
    sender.tell("desk", "t1")
    sender.tell("other", "t2")
    sender.queue.webhooks = {name: hook for name, hook in sender.queue.webhooks.items() if name == "other"}
    assert sender.database.call(lambda c: sender.queue.give_up(c, now_ms())) == 0
    assert sender.database.call(lambda c: sender.queue.give_up(c, now_ms() + 600_001)) == 1
    assert sender.states() == {"t1": "dead", "t2": "waiting"}


async def test_a_restart_goes_on_with_what_waits(tmp_path: Path) -> None:
    async with listening(Receiver()) as receiver:
        before = Sender(tmp_path, {"desk": receiver.port})
        before.tell("desk", "t1")
        before.database.close()
        after = Sender(tmp_path, {"desk": receiver.port})
        # Read again from Kafka, it is known.
        assert after.tell("desk", "t1") == 0
        async with after.running():
            await until(lambda: after.states() == {"t1": "delivered"}, DEADLINE_S)
        assert len(receiver.requests) == 1


async def test_a_changed_file_is_followed_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(Receiver()) as receiver:
        sender = Sender(tmp_path, {"desk": 1}, attempts_max=100, first_ms=10)
        sender.tell("desk", "t1")
        async with sender.running():
            sender.path.write_text("webhooks: [whsec_secret")
            await until(lambda: "those of before stay" in caplog.text, DEADLINE_S)
            sender.write({"desk": receiver.port})
            await until(lambda: sender.states() == {"t1": "delivered"}, DEADLINE_S)
        assert "whsec_" not in caplog.text


def test_pauses_double_up_to_their_bound() -> None:
    assert [pause_ms(n, 1000, 0.0) for n in (1, 2, 3)] == [1000, 2000, 4000]
    assert pause_ms(2, 1000, 0.999) == 1001
    assert pause_ms(100, 1000, 0.0) == BACKOFF_MAX_S * 1000


def hook(**changes: Any) -> dict[str, Any]:
    return {"name": "desk", "url": "https://h.example/x", "secrets": [NEW]} | changes


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([hook(url="ftp://h.example")], "http:// or https://"),
        ([hook(url="file:///etc/passwd")], "http:// or https://"),
        ([hook(url="https://user:secret@h.example")], "without a user"),
        ([hook(url="https:///x")], "with a host"),
        ([hook(name="a b")], "its name"),
        ([hook(), hook()], "its name must be its own"),
        ([hook(secrets=[])], "secrets are needed"),
        ([hook(secrets=[NEW] * (SECRETS_MAX + 1))], "secrets are needed"),
        ([hook(secrets=["whsec_c2hvcnQ="])], "random bytes"),
        ([hook(secrets=[NEW.removeprefix("whsec_")])], "random bytes"),
        ([hook(kinds=["everything"])], "kinds must be"),
        ([hook(port=1)], "unknown field"),
        ([hook(name=f"h{i}") for i in range(WEBHOOKS_MAX + 1)], "more than"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_its_secrets(tmp_path: Path, hooks: Any, message: str) -> None:
    path = tmp_path / "webhooks.json"
    path.write_text(json.dumps({"webhooks": hooks}))
    with pytest.raises(WebhookFileError, match=message) as caught:
        load_webhooks(str(path))
    assert "whsec_" not in str(caught.value).replace("must be whsec_", "") and "c2hvcnQ" not in str(caught.value)


def test_as_many_webhooks_and_secrets_as_may_be_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "webhooks.json"
    hooks = [hook(name=f"h{i}", secrets=[NEW] * SECRETS_MAX) for i in range(WEBHOOKS_MAX)]
    path.write_text(json.dumps({"webhooks": hooks}))
    assert len(load_webhooks(str(path))) == WEBHOOKS_MAX
    assert load_webhooks("") == {}
    assert NEW.removeprefix("whsec_") not in repr(load_webhooks(str(path)))
