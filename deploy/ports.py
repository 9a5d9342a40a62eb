"""Ports for a stack of one's own, beside whatever else runs here. For benchmarks, the soak and tests."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
# Below the range from which Linux takes ports for outgoing connections, so that a port stays free while its server is down.
PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of loopback that nobody listens on. Raises RuntimeError when there are fewer."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{count} free ports are not to be had")
