"""One process that serves: the whole of `fraudgate serve` without --workers, or a worker of `gateway.supervisor`.

A worker gets the listening socket, a control line and a directory for metrics from its supervisor. On the line it says `ready` when it
serves and `released` when it has left the consumer group; it is told `consume` when the worker before it has left, since two of one
instance would fence each other. When the line breaks, the supervisor is gone and the worker leaves too.

A process without a supervisor is told by signals: SIGUSR1 to join the consumer group, SIGUSR2 to leave it and go on serving HTTP. So
`fraudgate deploy` hands the topic from one version to the next, and back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from gateway.api_keys import KeyFileError
from gateway.app import DRAIN_S, Gateway
from gateway.contracts.settings import Settings, load_settings
from gateway.errors import PolicyRefusedError
from gateway.http.listener import Listener
from gateway.http.protocol import protocol_of
from gateway.supervisor import LISTEN_BACKLOG, POLICY_STATUS
from gateway.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

READY, RELEASED, CONSUME = b"ready\n", b"released\n", b"consume\n"


class GatewayServer(uvicorn.Server):
    """uvicorn's server, which leaves in our order: no new connections, out of the consumer group, last answers, then the rest."""

    def __init__(
        self, config: uvicorn.Config, gateway: Gateway, inherited: socket.socket | None = None, control: socket.socket | None = None
    ) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._control = control
        # Its supervisor's listening socket. None: it listens to the configured port itself, once it can serve.
        self._inherited = inherited
        self._listener: Listener | None = None
        self._following: asyncio.Task[None] | None = None
        self._turns: set[asyncio.Task[None]] = set()
        # Joining and leaving take their turns, in the order they were asked for.
        self._turn = asyncio.Lock()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        try:
            listening = self._inherited or socket.create_server((self.config.host, self.config.port), backlog=self.config.backlog)
        except OSError as exc:
            log.error("worker: can't listen on %s:%d: %s", self.config.host, self.config.port, exc)  # noqa: TRY400
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self._listener = Listener(listening, self._protocol)
        if self._control is not None and self.started:
            self._following = asyncio.create_task(self._follow(self._control))
        elif self.started:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR1, self._heed, True)
            loop.add_signal_handler(signal.SIGUSR2, self._heed, False)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._listener is not None:
            self._listener.close()
        self._gateway.leave()
        leaving = asyncio.create_task(self._leave_group())
        await super().shutdown([])
        await leaving
        if self._following is not None:
            self._following.cancel()

    async def _leave_group(self) -> None:
        async with self._turn:
            await self._gateway.stop_consuming()
        self._say(RELEASED)

    def _heed(self, joins: bool) -> None:
        turn = asyncio.create_task(self._change(joins))
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)

    async def _change(self, joins: bool) -> None:
        async with self._turn:
            if not joins:
                await self._gateway.stop_consuming()
            elif not self.should_exit:
                self._gateway.consume()
        log.info("worker: %s the consumer group, as told", "joins" if joins else "left")

    def _say(self, line: bytes) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(line)

    async def _follow(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        control.setblocking(False)
        self._say(READY)
        while line := await loop.sock_recv(control, 64):
            if CONSUME in line:
                self._gateway.consume()
        log.warning("worker: the supervisor is gone, leaving")
        self.should_exit = True


def run(settings: Settings, *, kafka: bool, consume: bool = True) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status. Raises `PolicyRefusedError`.

    Without `consume` it is in no consumer group until SIGUSR1.
    """
    return _serve(settings, Gateway(settings, kafka=kafka, consume=consume), None, None)


def _serve(settings: Settings, gateway: Gateway, socket_: socket.socket | None, control: socket.socket | None) -> int:
    config = uvicorn.Config(
        gateway,
        host=settings.host,
        port=settings.gateway_port,
        loop="uvloop",
        http=protocol_of(gateway.door, gateway.connections),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        backlog=LISTEN_BACKLOG,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=int(DRAIN_S),
    )
    # uvicorn raises the signal again once it has shut down: it has been heeded by then.
    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, lambda *_: None)
    server = GatewayServer(config, gateway, socket_, control)
    server.run()
    return gateway.exit_status if server.started else 1


def log_to_stderr(prefix: str = "") -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {prefix}%(message)s", stream=sys.stderr)
    # aiokafka tells each retry of a connection; the doors say once that Kafka is down.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    # The tracer says once that the collector doesn't take traces.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gateway.worker", description="One worker of fraudgate serve --workers.")
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--metrics-dir", type=Path, required=True)
    parser.add_argument("--no-kafka", action="store_true")
    args = parser.parse_args(argv)
    settings = load_settings()
    settings = dataclasses.replace(settings, instance_id=f"{settings.instance_id}-{args.slot}")
    log_to_stderr(f"worker {args.slot} ")
    try:
        gateway = Gateway(settings, kafka=not args.no_kafka, consume=False)
    except KeyFileError as exc:
        print(f"fraudgate serve: the API keys can't be used: {exc}", file=sys.stderr)  # noqa: T201
        return POLICY_STATUS
    except PolicyRefusedError as exc:
        print(f"fraudgate serve: the policy can't be used: {exc}", file=sys.stderr)  # noqa: T201
        return POLICY_STATUS
    gateway.worker_metrics = WorkerMetrics(gateway.metrics.registry, args.metrics_dir, f"{args.slot}-{os.getpid()}")
    return _serve(settings, gateway, socket.socket(fileno=args.listen_fd), socket.socket(fileno=args.control_fd))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
