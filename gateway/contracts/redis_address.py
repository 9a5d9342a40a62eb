"""What the setting `redis_url` can say: one Redis, or some nodes of a Redis Cluster, from which the others are learned."""

from __future__ import annotations

from binascii import crc_hqx
from urllib.parse import urlsplit

CLUSTER_SLOTS = 16_384
REDIS_PORT = 6379
# The scheme of the setting, and that of a single node.
CLUSTER_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}


def is_cluster(url: str) -> bool:
    return url.partition("://")[0] in CLUSTER_SCHEMES


def cluster_seeds(url: str) -> list[str]:
    """The URL of each node named in redis+cluster://[[user]:password@]host[:port][,host[:port]...]. Raises ValueError."""
    scheme, _, rest = url.partition("://")
    before, at, hosts = rest.strip("/").rpartition("@")
    seeds = [f"{CLUSTER_SCHEMES.get(scheme, '')}://{before}{at}{host.strip()}" for host in hosts.split(",") if host.strip()]
    if scheme not in CLUSTER_SCHEMES or not seeds or "/" in hosts or not all(_has_address(seed) for seed in seeds):
        raise ValueError("the URL of a Redis Cluster must look like redis+cluster://host:port,host:port")
    return seeds


def _has_address(seed: str) -> bool:
    try:
        parts = urlsplit(seed)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        # No number for a port, or one that is none.
        return False


def hash_slot(key: str) -> int:
    """The slot of a key in a Redis Cluster: CRC-16 of what stands in its first braces, or of all when there is nothing in braces."""
    start = key.find("{")
    if start >= 0:
        end = key.find("}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key.encode(), 0) % CLUSTER_SLOTS
