"""The open-loop caller, against a server of a few lines."""

from __future__ import annotations

import asyncio

import pytest

from deploy.ports import free_ports
from loadtest.offered import FAILED, NOT_SENT, Offered, offer, quantile
from tests.helpers import HOST


def run(answer: bytes | None, *, connections: int = 10, held: bool = False) -> Offered:
    """20 requests to a server that gives `answer` to each, or closes the connection, or (held) answers nobody before the end."""

    transports: list[asyncio.WriteTransport] = []

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
            transports.append(self.transport)

        def data_received(self, data: bytes) -> None:
            if answer is None:
                self.transport.close()
            elif not held:
                self.transport.write(answer)

    def release() -> None:
        for transport in transports:
            transport.write(answer or b"")

    async def both() -> Offered:
        [port] = free_ports(1)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Server, HOST, port)
        if held:
            loop.call_later(0.5, release)
        result = await offer(HOST, port, lambda _: 100.0, 0.195, lambda i: (f"t-{i}", b"{}"), connections)
        server.close()
        for transport in transports:
            transport.close()
        await server.wait_closed()
        await asyncio.sleep(0)
        return result

    return asyncio.run(both())


def reply(status: int, body: bytes = b'{"transaction_id":"t-", "degraded":["request_only"]}', more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(body), more, body)


def test_each_request_is_counted_with_its_status() -> None:
    assert run(reply(429)).statuses() == {429: 20}
    assert run(reply(429, more=b"connection: close\r\n")).statuses() == {429: 20}


def test_an_answer_with_another_id_is_a_mix_up() -> None:
    found = run(reply(200))
    assert (found.statuses(), found.mixed_up) == ({200: 20}, 20)
    assert found.samples[0].degraded == '"request_only"'
    assert len(found.answered()) == 20


def test_a_connection_that_ends_without_an_answer_is_a_failure() -> None:
    assert run(None).statuses() == {FAILED: 20}


def test_what_finds_no_free_connection_is_not_sent() -> None:
    assert run(reply(429), connections=2, held=True).statuses() == {429: 2, NOT_SENT: 18}


def test_quantiles_are_of_an_ordered_list() -> None:
    assert [quantile([1.0, 2.0, 3.0], q) for q in (0, 0.5, 0.99, 1)] == pytest.approx([1, 2, 3, 3])
    assert str(quantile([], 0.5)) == "nan"
