"""What the text of a setting may be, in words for people and as a check. Read by `gateway.contracts.settings` and its generated page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from gateway.contracts.redis_address import cluster_seeds, is_cluster

PORT_MAX = 65_535
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BROKER = re.compile(r"(?P<host>[^\s:,/]+|\[[0-9A-Fa-f:]+\]):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Kind:
    """`words` follow "must be"; `accepts` is never asked about empty text."""

    words: str
    accepts: Callable[[str], bool]


def one_of(*choices: str) -> Kind:
    return Kind(" or ".join((", ".join(choices[:-1]), choices[-1])), choices.__contains__)


def _has_host(text: str, *schemes: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_redis(text: str) -> bool:
    if not is_cluster(text):
        return _has_host(text, "redis", "rediss")
    try:
        return bool(cluster_seeds(text))
    except ValueError:
        return False


def _are_brokers(text: str) -> bool:
    found = [_BROKER.fullmatch(broker.strip()) for broker in text.split(",")]
    return all(match is not None and 1 <= int(match["port"]) <= PORT_MAX for match in found)


TEXT = Kind("text", lambda text: text.isprintable())
NAME = Kind("a name: letters, digits, . _ and -, at most 128", lambda text: _NAME.fullmatch(text) is not None)
HOST = Kind("a host name or an address", lambda text: text.isprintable() and not set(text) & set(" /,"))
HTTP_URL = Kind("http:// or https:// with a host", lambda text: _has_host(text, "http", "https"))
REDIS_URL = Kind(
    "redis://host:port/db or rediss://..., or redis+cluster://host:port,host:port for a Redis Cluster",
    _is_redis,
)
BROKERS = Kind("host:port, separated by commas", _are_brokers)
