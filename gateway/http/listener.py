"""Takes new connections off a listening socket, several in one pass of the event loop.

libuv, and uvloop with it, takes one (since 1.45, its pull request 3696). A pass of a busy gateway lasts as long as the batches decided in
it: callers that all come back at once, because their connection was lost or an answer late, would wait in the queue of connections for
longer than they wait for an answer, give up and come again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

# In one pass: 1,600 a second where a pass takes 20 ms, and few enough that other workers get their share.
ACCEPTED_MOST = 32
# When no connection can be taken, for want of file descriptors or memory, the next look comes so much later.
PAUSE_S = 0.1


class Listener:
    """Made in a running loop. `protocol` makes the protocol of a new connection. `sock` is this object's from now on; other processes may
    have what it listens to as well.
    """

    def __init__(self, sock: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._sock = sock
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.TimerHandle | None = None
        # Since one could not be taken, until the next can: it is said once.
        self._troubled = False
        sock.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Takes no more; those taken stay. May be called twice."""
        if self._sock.fileno() < 0:
            return
        if self._resuming is not None:
            self._resuming.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _resume(self) -> None:
        self._resuming = None
        self._loop.add_reader(self._sock.fileno(), self._take)

    def _take(self) -> None:
        for _ in range(ACCEPTED_MOST):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                # Whoever it was has left already.
                continue
            except OSError as exc:
                self._pause(exc)
                return
            self._troubled = False
            opening = self._loop.create_task(self._open(sock))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    def _pause(self, why: OSError) -> None:
        if not self._troubled:
            self._troubled = True
            log.error("http: no connection can be taken, callers wait: %s", why)
        self._loop.remove_reader(self._sock.fileno())
        self._resuming = self._loop.call_later(PAUSE_S, self._resume)

    async def _open(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._protocol, sock)
        except OSError:
            sock.close()
