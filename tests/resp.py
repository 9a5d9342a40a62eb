"""Redis' replies as they go over the wire (RESP 2), for servers and links that tests stand in for."""

from __future__ import annotations

from typing import Any


class Status(str):
    """A reply that is no value, like OK."""

    __slots__ = ()


def encoded(reply: Any) -> bytes:
    """None is nil, bytes a value, a list an array, an exception an error with its message."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, Status):
        return b"+%b\r\n" % reply.encode()
    if isinstance(reply, Exception):
        return b"-%b\r\n" % str(reply).encode()
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b"*%d\r\n" % len(reply) + b"".join(encoded(each) for each in reply)
